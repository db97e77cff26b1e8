"""The glossary of tensor axes: what each letter in a shape suffix means, for the whole project.

A tensor's name ends in an underscore and one letter per axis, outermost first: `x_BTD` is [batch, tokens, width].
`1` marks an axis kept for broadcasting, as in `cos_BT1C`. A test holds every name in this room to this table.
"""

AXES: dict[str, str] = {
    "B": "batch: rows processed together",
    "T": "tokens of a row (of the queries, where queries and keys differ)",
    "S": "tokens that are attended to: keys and values, or cache slots",
    "Q": "blocks of queries",
    "J": "blocks of keys",
    "P": "blocks of queries paired with the blocks of keys they gather (sparse masks)",
    "L": "distances from a query to a key, from farthest behind to farthest ahead",
    "N": "tokens of all rows, flattened (B times T, or a chunk of it)",
    "D": "model width",
    "H": "query heads",
    "K": "key/value heads",
    "G": "query heads that share one key/value head (H = K times G)",
    "C": "channels of one head, or of a convolution",
    "M": "axes merged for a batched product, such as documents and key/value heads",
    "F": "hidden width of the feed-forward network",
    "V": "vocabulary entries",
    "R": "rank of a low-rank adapter",
    "I": "inputs of a linear map",
    "A": "planes of an image (its colours), bands of a spectrogram",
    "W": "samples of a waveform, frames of a spectrogram, or what convolutions make of them",
    "O": "others that a frame is told from",
    "U": "labels of a transcript",
    "Y": "rows of pixels or patches",
    "X": "columns of pixels or patches",
}
