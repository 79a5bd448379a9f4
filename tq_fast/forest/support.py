"""Which models the forest can run: by their configuration, and by trying them on three tokens."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ..errors import BackendRefused, UnsupportedModel
from .cache import LayerShapes
from .language import Forest, known_shapes


def check_supported(model: PreTrainedModel, role: str) -> None:
    """Refuse a model that the forest cannot run, by its configuration; `check_runs` tries it.

    Raises:
        UnsupportedModel: the message names the role, the model type and the feature.
    """
    config = model.config.get_text_config()
    name = f"{role}: model type {model.config.model_type!r}"
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{name} is an encoder-decoder; a decoder-only model is needed")
    if not getattr(model, "_supports_attention_backend", False):
        raise UnsupportedModel(
            f"{name} does not use the attention interface of transformers, through which the "
            "shared-prefix cache works"
        )
    kinds = set(getattr(config, "layer_types", None) or ()) - {
        "full_attention",
        "sliding_attention",
    }
    if kinds:
        raise UnsupportedModel(
            f"{name} has layers of kind {', '.join(sorted(kinds))}; only full_attention and "
            "sliding_attention are honoured"
        )
    if getattr(config, "use_bidirectional_attention", None):
        raise UnsupportedModel(f"{name} attends in both directions (use_bidirectional_attention)")
    if getattr(config, "is_decoder", True) is False and hasattr(config, "type_vocab_size"):
        raise UnsupportedModel(f"{name} is an encoder (is_decoder=False)")


@torch.no_grad()
def check_runs(model: PreTrainedModel) -> int:
    """Push three tokens through a forest of one tree: what it does not honour shows at once.

    A model that ran once is not tried again. Returns the bytes of KV that a token takes.

    Raises:
        UnsupportedModel: the message names the model type and the feature.
    """
    if model in known_shapes:
        return _bytes_per_token(known_shapes[model])
    forest = Forest(
        model, num_trees=1, num_rows=1, prefix_capacity=2, branch_capacity=1, backend=None
    )
    is_language_model = model.get_output_embeddings() is not None
    module = forest.model if is_language_model else forest.model.base_model
    try:
        forest.run_prefill(module, 0, [0, 0])
        token = torch.zeros(1, 1, dtype=torch.int64, device=forest.device)
        forest.run_branches(module, token, start=0, tree=token[0])
    except (torch.OutOfMemoryError, BackendRefused):
        raise
    except Exception as error:
        if _is_of_installation(error):
            raise
        # Whatever the model's own code makes of a cache that it does not expect.
        raise UnsupportedModel(
            f"model type {model.config.model_type!r} does not run over the shared-prefix cache: "
            f"{error}"
        ) from error
    known_shapes[model] = forest.cache.shapes
    return _bytes_per_token(forest.cache.shapes)


def _bytes_per_token(shapes: LayerShapes) -> int:
    return sum(keys.num_bytes + values.num_bytes for keys, values in shapes.values())


def _is_of_installation(error: Exception) -> bool:
    """Whether an error shows that a kernel or a library is broken, whatever the model."""
    is_of_triton = any(kind.__module__.split(".")[0] == "triton" for kind in type(error).__mro__)
    # Older releases of PyTorch raise a RuntimeError for errors of CUDA, as its libraries do.
    is_of_device = isinstance(error, RuntimeError) and any(
        name in str(error) for name in ("CUDA error", "CUBLAS_STATUS", "CUDA driver", "[CUDA]")
    )
    return isinstance(error, (ImportError, OSError)) or is_of_triton or is_of_device
