"""The DeepSpeed engine, built from the configuration of a run; DeepSpeed gets the dictionary below and no JSON file."""

import ctypes
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from focalclip.base.errors import UserError
from focalclip.base.ranks import rank, world_size
from focalclip.config import RunConfig
from focalclip.training.optim import create_optimizer, create_schedule

_DATA_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # torch's own switch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def set_up() -> None:
    """Set DeepSpeed up; within ``focalclip.base.ranks.joined(alone=True)``, before anything else imports deepspeed."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        _keep_freed_memory()
    import deepspeed
    import deepspeed.ops

    deepspeed.utils.logger.setLevel(logging.ERROR)
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        # DeepSpeed 0.19 compiles this C++ operator at every first start (minutes) though training never calls it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()  # over the group that exists


def device() -> torch.device:
    """Device of this rank."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def check(config: RunConfig) -> None:
    """Refuse what the engine cannot do before anything is built.

    Raises:
        UserError: naming the field and the remedy.
    """
    if config.train.precision == "fp16" and not torch.cuda.is_available():
        raise UserError("train.precision=fp16 needs a GPU; use fp32 or amp_bf16 here")
    if config.train.precision in ("bf16", "fp16") and config.train.zero_stage == 0:
        raise UserError(
            f"train.precision={config.train.precision} with train.zero_stage=0 starts Adam one step late in DeepSpeed; "
            "use train.zero_stage=1"
        )


def deepspeed_config(config: RunConfig, ranks: int) -> dict[str, Any]:
    """DeepSpeed's dictionary for this run."""
    settings: dict[str, Any] = {
        "train_batch_size": config.data.batch_size,
        "train_micro_batch_size_per_gpu": config.data.batch_size // ranks // config.train.accumulation,
        "gradient_accumulation_steps": config.train.accumulation,
        # Always written: DeepSpeed's default is 1.0, not off. At ZeRO 0 it would neither tell the norm nor look at it.
        "gradient_clipping": config.optim.clip_grad_norm if config.train.zero_stage else 0.0,
        "zero_optimization": {"stage": config.train.zero_stage},
        "steps_per_print": 10**9,
    }
    precision = {
        "fp32": {},
        "amp_bf16": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
        "bf16": {"bf16": {"enabled": True}},
        "fp16": {"fp16": {"enabled": True}},
    }
    return settings | precision[config.train.precision]


def create_engine(model: nn.Module, config: RunConfig, total_steps: int, load_universal: bool = False) -> Any:
    """Wrap ``model`` with its optimizer and schedule in a DeepSpeed engine.

    ``load_universal`` announces that a checkpoint in DeepSpeed's universal form will be loaded into it.
    """
    import deepspeed

    model = model.to(device())
    optimizer = create_optimizer(model, config.optim)
    if config.train.zero_stage == 0:
        _clip_or_skip(optimizer, model, config.optim.clip_grad_norm)
    schedule: Any = torch.optim.lr_scheduler.LambdaLR(optimizer, create_schedule(config.optim, total_steps))
    settings = deepspeed_config(config, world_size()) | {"checkpoint": {"load_universal": load_universal}}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=settings)
    if world_size() == 1 and config.train.zero_stage == 0:
        engine.enable_backward_allreduce = False  # it would copy every gradient twice to average it with itself
    return engine


def input_dtype(config: RunConfig) -> torch.dtype:
    """Dtype of images that the engine's weights take."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.train.precision, torch.float32)


def num_elements(parameter: nn.Parameter) -> int:
    """Size of the whole parameter; ZeRO 3 replaces it by an empty tensor and keeps the size in ``ds_numel``."""
    return getattr(parameter, "ds_numel", parameter.numel())


def shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Shape of the whole parameter, also where ZeRO 3 has sharded it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def full_weights(engine: Any) -> AbstractContextManager:
    """Context in which every rank sees whole parameters, which ZeRO 3 shards."""
    import deepspeed

    sharded = engine.zero_optimization_stage() == 3
    return deepspeed.zero.GatheredParameters(list(engine.module.parameters()) if sharded else [], enabled=sharded)


def finish_step(engine: Any) -> Tensor:
    """What one optimiser step leaves to do; called after it, by all ranks.

    A step whose gradient is not finite has moved neither weights nor moments: at ZeRO 0 by :func:`_clip_or_skip`, above
    by DeepSpeed. DeepSpeed does not move the schedule then either, which here depends on the number of steps alone.

    Returns:
        Norm of the whole gradient before clipping, 0-dim float32 on the device; not finite where the step was skipped.
    """
    if not engine.was_step_applied():
        with warnings.catch_warnings(
            action="ignore"
        ):  # torch expects a step of the optimiser before the first of these
            engine.lr_scheduler.step()
    return torch.as_tensor(engine.get_global_grad_norm(), dtype=torch.float32, device=device()).reshape(())


def is_finite(engine: Any) -> bool:
    """Whether this rank's weights, running statistics and optimiser state are all finite; waits for the device."""
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)  # ZeRO wraps it
    masters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    tensors = [*engine.module.parameters(), *running_statistics(engine.module), *masters, *moments]
    checks = [x.detach().isfinite().all() for x in tensors if x.is_floating_point()]
    return bool(torch.stack([check.to(device()) for check in checks]).all())


@contextmanager
def data_only() -> Iterator[None]:
    """Within this context, also in processes it starts, ``torch.load`` runs no code, whatever its caller asks for.

    DeepSpeed 0.19 loads with ``weights_only=False``. Its own classes that its files hold are allowed.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaleProfile, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    allowed: list[Any] = [DynamicLossScaler, LossScaler, LossScaleProfile, ZeroStageEnum, fragment_address]
    before = os.environ.get(_DATA_ONLY)
    os.environ[_DATA_ONLY] = "1"
    try:
        with torch.serialization.safe_globals(allowed):
            yield
    finally:
        if before is None:
            del os.environ[_DATA_ONLY]
        else:
            os.environ[_DATA_ONLY] = before


def running_statistics(module: nn.Module) -> list[Tensor]:
    """The buffers that training changes: those of torch's batch normalisation and of ours."""
    names = ("running_mean", "running_var", "num_batches_tracked")
    return [buffer for name, buffer in module.named_buffers() if name.rpartition(".")[2] in names]


def seed_step(seed: int, step: int) -> None:
    """Seed torch's generator for what a foreign tower draws from it, so that its state is not saved.

    Dropout and stochastic depth do not use it, see :mod:`focalclip.models.draws`.
    """
    torch.manual_seed(((seed * 1_000_003 + step) * 65_537 + rank()) % 2**63)


def _clip_or_skip(optimizer: torch.optim.Optimizer, model: nn.Module, max_norm: float) -> None:
    """Before each step, clip the gradient by its norm, or skip the step where the norm is not finite.

    A fused optimiser skips on the device, so that no step waits for it; any other waits.
    """
    from deepspeed.runtime.utils import clip_grad_norm_

    def before(*_: object) -> None:
        norm = clip_grad_norm_(model.parameters(), max_norm or math.inf)
        optimizer._global_grad_norm = norm  # pyrefly: ignore[missing-attribute]  # where DeepSpeed looks for it
        if getattr(optimizer, "_step_supports_amp_scaling", False):  # as torch's GradScaler asks
            optimizer.found_inf = (~norm.isfinite()).float()  # pyrefly: ignore[missing-attribute]
        elif not norm.isfinite():
            optimizer.zero_grad(set_to_none=True)  # parameters without a gradient are not touched

    optimizer.register_step_pre_hook(before)


def _keep_freed_memory() -> None:
    """Let glibc's allocator reuse the large tensors of a step instead of handing each back to the kernel.

    By default every tensor above 128 KiB to 32 MiB (the threshold adapts) gets a separate memory mapping, whose pages
    are zeroed at each use: a tenth of a step of the default model. Other C libraries are not changed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the largest that glibc takes
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
