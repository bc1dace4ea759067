"""Models on disk: saved folders without pickle, and the files an inference runtime runs."""

from aerogel.export.hf import load_hf as load_hf
from aerogel.export.hf import parse_size as parse_size
from aerogel.export.models import Opened as Opened
from aerogel.export.models import example_inputs as example_inputs
from aerogel.export.models import input_of as input_of
from aerogel.export.models import open_counted as open_counted
from aerogel.export.models import open_model as open_model
from aerogel.export.models import saved_folder as saved_folder
from aerogel.export.models import split_source as split_source
from aerogel.export.saved import Config as Config
from aerogel.export.saved import InputSpec as InputSpec
from aerogel.export.saved import load as load
from aerogel.export.saved import load_weights as load_weights
from aerogel.export.saved import read_config as read_config
from aerogel.export.saved import save as save
