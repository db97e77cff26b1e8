"""Every kind of head there is."""

from model.heads.classifiers import ClassifierHeadConfig, SpanHeadConfig, TokenClassifierHeadConfig
from model.heads.ctc import CtcHeadConfig
from model.heads.distractor import DistractorHeadConfig
from model.heads.embedding import EmbeddingHeadConfig
from model.heads.language import LanguageHeadConfig, NoHeadConfig

AnyHeadConfig = (
    LanguageHeadConfig
    | ClassifierHeadConfig
    | TokenClassifierHeadConfig
    | SpanHeadConfig
    | CtcHeadConfig
    | EmbeddingHeadConfig
    | DistractorHeadConfig
    | NoHeadConfig
)
"""What a configuration chooses from, told apart by `kind`; each is a `HeadConfig`."""
