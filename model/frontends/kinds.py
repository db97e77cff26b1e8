"""Every kind of frontend there is."""

from model.frontends.mel import MelFrontendConfig
from model.frontends.patches import PatchFrontendConfig
from model.frontends.text import TokenFrontendConfig
from model.frontends.waveform import WaveformFrontendConfig

AnyFrontendConfig = TokenFrontendConfig | PatchFrontendConfig | WaveformFrontendConfig | MelFrontendConfig
"""What a configuration chooses from, told apart by `kind`; each is a `FrontendConfig`."""
