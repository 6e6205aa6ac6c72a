"""Models whose weights are shared out among the processes (ZeRO 3): each holds a part of every one, and a
pass gathers those of a module where it comes to it.

DeepSpeed does so by hooks on the modules. All processes make the same passes, each with its own rows. A model
that samples is copied whole for a rollout, so that its weights travel once and not for every token.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rlhf.engine import Engine
from rlhf.models.loading import trunk
from rlhf.models.lora import merged_weight
from rlhf.processes import buckets, processes
from rlhf.zero import Root, initialize, load_deepspeed, local_rank, share_out

T = TypeVar("T")


def shard(
    model: Any, engine: Engine, *, trained: bool, parts: Sequence[nn.Module] = (), copied: bool = False
) -> None:
    """Share out the weights of a model, or of some parts of it and of its roles, where the engine does so.

    Those of trained models get their hooks with their optimizer (`Engine.adamw`). `copied`: the model can be
    asked for whole, by `whole_copy`. Adapters are added afterwards, and every process has them whole.
    """
    if not engine.shards_weights:
        return
    assert engine.deepspeed is not None
    modules = list(parts) or [model]
    root = Root(modules, template=_without_weights(model).to(engine.device) if copied else None)
    root.requires_grad_(trained)
    share_out(root, engine.deepspeed)
    model.to(engine.device)
    if not trained:
        initialize(root, engine.deepspeed)
    object.__setattr__(trunk(model), "sharded_root", root)  # beside the modules, which lie inside it


def root_of(model: Any) -> Root | None:
    """What the hooks of a model hang on, where its weights are shared out."""
    return vars(trunk(model)).get("sharded_root")


def through(model: Any, work: Callable[[], T]) -> T:
    """The result of passes through a model, where its weights are shared out and where they are not."""
    root = root_of(model)
    return work() if root is None else root.run(work)


@contextlib.contextmanager
def whole_weights(module: nn.Module, *, change: bool = False) -> Iterator[None]:
    """Inside, every process has the trained weights of a module whole; all enter together. `change`: the
    first process may write to them.
    """
    shared_out = [each for each in module.parameters() if each.requires_grad and hasattr(each, "ds_id")]
    with _gathered(shared_out, modifier_rank=0 if change else None):
        yield


def own_part(parameter: Any) -> Tensor:
    """This process's numbers of a weight that is shared out, without those that fill its part up, which are
    anything; the weight where it is whole.
    """
    part = getattr(parameter, "ds_tensor", None)
    if part is None:
        return parameter.detach()
    return part[: max(0, parameter.ds_numel - processes().rank * part.numel())]


@contextlib.contextmanager
def whole_copy(model: Any, engine: Engine) -> Iterator[Any]:
    """A plain copy of a model with its acting adapter merged and its matrices in the number type of products;
    the model itself where its weights are not shared out. All processes enter together.
    """
    root = root_of(model)
    if root is None:
        yield model
        return
    copied = _filled(model, root, engine.dtype)
    try:
        yield copied
    finally:
        give_back(copied, model)


def unsharded(model: Any) -> Any:
    """A plain copy with the weights as they are; the model itself where they are not shared out."""
    root = root_of(model)
    return model if root is None else _filled(model, root, None)


def give_back(copied: Any, model: Any) -> None:
    """Free the weights of a copy of a model; where it is the model itself they stay."""
    if copied is not model:
        for parameter in copied.parameters():
            parameter.data = parameter.data.new_empty(0)


def _without_weights(model: Any) -> Any:
    nothing = {id(each): nn.Parameter(each.new_empty(0), requires_grad=False) for each in model.parameters()}
    return copy.deepcopy(model, nothing)


def _filled(model: Any, root: Root, dtype: torch.dtype | None) -> Any:
    copied, base = root.template, model.get_base_model() if hasattr(model, "peft_config") else model
    assert copied is not None, "this model was not sharded to be copied"
    embeddings = {id(module.weight) for module in copied.modules() if isinstance(module, nn.Embedding)}
    matrices = {
        id(module.weight) for module in copied.modules() if isinstance(module, nn.Linear | Conv1D)
    } - embeddings
    names = {parameter: name for name, parameter in base.named_parameters() if ".lora_" not in name}
    for some in buckets(list(names), lambda each: getattr(each, "ds_numel", 0)):
        with _gathered([each for each in some if hasattr(each, "ds_id")]), torch.no_grad():
            for parameter in some:
                place = copied.get_parameter(names[parameter].replace(".base_layer.", "."))
                rounds = dtype is not None and id(place) in matrices
                place.data = parameter.data.to(dtype if rounds else parameter.dtype, copy=True)
    with torch.no_grad():
        for name, layer in base.named_modules():
            if isinstance(layer, LoraLinear) and not layer.disable_adapters:
                weight = copied.get_submodule(name).weight
                weight.data = merged_weight(layer, weight.data)
    return copied


@contextlib.contextmanager
def _gathered(parameters: list[Any], *, modifier_rank: int | None = None) -> Iterator[None]:
    if not parameters:
        yield
        return
    zero = load_deepspeed().zero
    with local_rank(), zero.GatheredParameters(parameters, modifier_rank=modifier_rank):
        yield
