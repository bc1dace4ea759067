"""Reads a model once into a graph that everything else reads."""

from aerogel.graph.capture import capture as capture
from aerogel.graph.capture import evaluating as evaluating
from aerogel.graph.capture import tensor_names as tensor_names
from aerogel.graph.graph import Graph as Graph
from aerogel.graph.graph import Op as Op
from aerogel.graph.graph import Ref as Ref
from aerogel.graph.graph import Value as Value
from aerogel.graph.graph import fill as fill
from aerogel.graph.graph import refs as refs
