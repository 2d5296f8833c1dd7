"""The DeepSpeed engine, built from the configuration of a run; DeepSpeed gets the dictionary below and no JSON file."""

import ctypes
import logging
import os
import sys
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from focalclip.base.errors import UserError
from focalclip.base.ranks import rank, world_size
from focalclip.config import RunConfig
from focalclip.training.optim import create_optimizer, create_schedule

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
        "gradient_clipping": config.optim.clip_grad_norm,  # always written: DeepSpeed's default is 1.0, not off
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


def full_weights(engine: Any) -> AbstractContextManager:
    """Context in which every rank sees whole parameters, which ZeRO 3 shards."""
    import deepspeed

    sharded = engine.zero_optimization_stage() == 3
    return deepspeed.zero.GatheredParameters(list(engine.module.parameters()) if sharded else [], enabled=sharded)


def seed_step(seed: int, step: int) -> None:
    """Seed the generator for draws inside the model at ``step`` (stochastic depth), so that its state is not saved."""
    torch.manual_seed(((seed * 1_000_003 + step) * 65_537 + rank()) % 2**63)


def _keep_freed_memory() -> None:
    """Let glibc's allocator reuse the large tensors of a step instead of handing each back to the kernel.

    By default every tensor above 128 KiB to 32 MiB (the threshold adapts) gets a separate memory mapping, whose pages
    are zeroed at each use: a tenth of a step of the default model. Other C libraries are not changed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the largest that glibc takes
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
