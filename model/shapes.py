"""The glossary of tensor axes: what each letter in a shape suffix means, for the whole project.

A tensor's name ends in an underscore and one letter per axis, outermost first: `x_BTD` is [batch, tokens, width].
`1` marks an axis kept for broadcasting, as in `cos_BT1C`. A test holds every name in this room to this table.
"""

AXES: dict[str, str] = {
    "B": "batch: rows processed together",
    "T": "tokens of a row (of the queries, where queries and keys differ)",
    "S": "tokens that are attended to: keys and values, or cache slots",
    "Q": "blocks of queries; with experts, copies of tokens, one for each choice, sorted by expert",
    "J": "blocks of keys; with experts, those that one token chose, best first",
    "A": "tokens of a row that see all of it (global tokens); planes of an image, bands of a spectrogram",
    "P": "blocks of queries paired with the blocks of keys they gather; in linear attention, features of a query or key",
    "L": "distances from a query to a key, from farthest behind to farthest ahead",
    "N": "tokens of all rows, flattened (B times T, or a chunk of it)",
    "D": "model width",
    "H": "query heads",
    "K": "key/value heads",
    "G": "groups: query heads that share one key/value head (H = K times G), experts chosen from together",
    "C": "channels of one head, or of a convolution",
    "M": "axes merged for a batched product, such as documents and key/value heads",
    "E": "experts",
    "F": "hidden width of the feed-forward network or of a state space mixer",
    "Z": "state of one channel of a state space mixer",
    "U": "tokens of a chunk; with transcripts, labels of one",
    "Y": "chunks of a row; with images, rows of pixels or patches",
    "V": "vocabulary entries",
    "R": "rank of a low-rank adapter, width of a latent vector",
    "I": "inputs of a linear map",
    "W": "samples of a waveform, frames of a spectrogram, or what convolutions make of them",
    "O": "others that a frame is told from",
    "X": "columns of pixels or patches",
}
