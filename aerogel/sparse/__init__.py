"""Small files for sparse weights: zeros cost almost nothing, shared values a few bits."""

from aerogel.sparse.codebook import Codebooks as Codebooks
from aerogel.sparse.codebook import fewest_bits as fewest_bits
from aerogel.sparse.codebook import share as share
from aerogel.sparse.codec import decode as decode
from aerogel.sparse.codec import encode as encode
from aerogel.sparse.codec import iid_bits as iid_bits
from aerogel.sparse.files import is_sparse as is_sparse
from aerogel.sparse.files import read as read
from aerogel.sparse.files import write as write
