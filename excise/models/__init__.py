"""Models: a causal language model and its parts.

Here: entries of `models.yaml`, reading and refusing checkpoints, the topology of an architecture, placement on devices,
prompts as tokens. Not here: what is asked of a model (`scenarios`), how answers are drawn (`generation`), and changes
to its weights (`interventions`).
"""

from excise.lazily import lazily

_PLACES = {
    "LoadedModel": "excise.models.loading",
    "ModelSpec": "excise.models.specs",
    "encode": "excise.models.encoding",
    "load_model": "excise.models.loading",
    "load_registry": "excise.models.specs",
}
__all__ = list(_PLACES)
__getattr__, __dir__ = lazily(__name__, _PLACES)
