"""Compiles every Triton kernel ahead of time, exactly as its launcher would start it, and prints what each one uses.

Run as a program: ``python aot_compile.py ARCH...``. The launchers run on meta tensors with ``JITFunction.run`` replaced
by a recorder, so signatures, constants and warps are those of real calls; no GPU and no driver is needed.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

mix, norm_act_mix, sigmoid_focal_loss = (
    importlib.import_module(f"nasdet.kernels.{op}") for op in ("mix", "norm_act_mix", "sigmoid_focal_loss")
)
mixed, grouped, convolutions, choices = (
    importlib.import_module(f"nasdet.kernels.{name}")
    for name in ("mixed_dilation_conv2d", "grouped_dilation_conv2d", "_dilation_run", "_dilation_choice")
)
MAPS, SHAPE, GROUPS = 12, (2, 96, 100, 152), 32  # RepShare's node on P3
NAMES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32",
}  # fmt: skip
SHARED_MEMORY = {80: 166912, 90: 232448}  # bytes that one block may have
PRODUCTS = ((torch.bfloat16, ""), (torch.float16, ""), (torch.float32, "tf32"), (torch.float32, "ieee"))
CUOBJDUMP, PTXAS = (Path(triton.__file__).parent / "backends/nvidia/bin" / name for name in ("cuobjdump", "ptxas"))

Launch = tuple[JITFunction, dict[str, Any], dict[str, int]]  # kernel, arguments by name, warps and stages


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Within the block, launches are added to the list instead of started."""
    launches: list[Launch] = []

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, num_warps: int, **kwargs: Any) -> None:
        options = {"num_warps": num_warps}
        if "num_stages" in kwargs:
            options["num_stages"] = kwargs.pop("num_stages")
        launches.append((self, dict(zip(self.arg_names, args, strict=False)) | kwargs, options))

    with mock.patch.object(JITFunction, "run", record):
        yield launches


def recorded_launches(dtype: torch.dtype, memory_format: torch.memory_format) -> list[Launch]:
    xs = [torch.empty(SHAPE, dtype=dtype, device="meta", memory_format=memory_format) for _ in range(MAPS)]
    weights = torch.empty(MAPS, device="meta")
    gamma, beta = torch.empty(2, MAPS, SHAPE[1], device="meta").unbind()
    with recording() as launches:
        y = mix.forward(xs, weights)
        mix.backward(y, xs, weights, True, True)
        y, mean, rstd = norm_act_mix.forward(xs, weights, gamma, beta, GROUPS, 1e-5, [1] * MAPS)
        norm_act_mix.backward(y, xs, weights, gamma, beta, mean, rstd, GROUPS, [1] * MAPS)
        for gamma in (2.0, 1.5):
            sigmoid_focal_loss.forward(xs[0], xs[1], 0.25, gamma, True)
            loss = sigmoid_focal_loss.forward(xs[0], xs[1], 0.25, gamma, False)
            sigmoid_focal_loss.backward(loss, xs[0], xs[1], 0.25, gamma, False, True, True)
    return launches


@contextlib.contextmanager
def as_on(arch: int, kind: str) -> Iterator[None]:
    """Within the block, convolutions are planned as for a device of this architecture."""
    mixed._plan.cache_clear()
    grouped._plan.cache_clear()
    with (
        mock.patch.object(convolutions, "kind_of", lambda x: kind),
        mock.patch.object(choices, "processor_of", lambda device: (arch, SHARED_MEMORY[arch])),
    ):
        yield
    mixed._plan.cache_clear()
    grouped._plan.cache_clear()


def recorded_convolutions(dtype: torch.dtype, precision: str, arch: int) -> list[tuple[str, Launch, bool]]:
    """Every configuration of every product for a large map, and the first choice for a narrower one and for ResNeXt's
    groups; with a label, and whether it is the first choice of its product.

    The grouped form has parts of several widths, so that its kernels hold code for each of them.
    """
    firsts: set[int] = set()

    def every_candidate(choice: Any, like: Any, launch: Callable[[Any], None]) -> None:
        firsts.add(len(launches))
        for config in choice.candidates:
            launch(choice.prepared(config))

    x = torch.empty(4, 256, 50, 84, dtype=dtype, device="meta", memory_format=torch.channels_last)
    kernels, factors = torch.empty(5, 256, 256, 3, 3, dtype=dtype, device="meta"), torch.empty(5, 256, device="meta")
    own, dense = (torch.empty(256, fan, 3, 3, dtype=dtype, device="meta") for fan in (8, 256))
    set_c, narrow = [1, 1, 2, 2, 3, 3, 1, 3, 3, 1], [112, 80, 32, 16, 16]
    kind = "16-bit" if dtype != torch.float32 else precision
    first, every = (mock.patch.object(choices, "MEASURED", count) for count in (1, 100))
    most = first if dtype == torch.float16 else every
    with as_on(arch, kind), recording() as launches:
        with mock.patch.object(convolutions, "run_fastest", every_candidate), most:
            mixed.forward(x, kernels, factors, set_c, 1, 1, 1, 0)
            mixed.backward(x, x, kernels, factors, set_c, 1, 1, 1, 0, False, True, True)
            grouped.forward(x, dense, set_c, narrow, 1, 1, 1, 0)
            grouped.backward(x, x, dense, set_c, narrow, 1, 1, 1, 0, True, True)
        if dtype != torch.float16:  # of which no more is compiled than shows that it is as the other 16 bits
            half, halves = x[:, :128].contiguous(memory_format=torch.channels_last), kernels[:, :128, :128].contiguous()
            with mock.patch.object(convolutions, "run_fastest", every_candidate), first:
                mixed.forward(half, halves, factors[:, :128], set_c, 1, 1, 1, 0)
                mixed.backward(half, half, halves, factors[:, :128], set_c, 1, 1, 1, 0, True, True, True)
        if dtype == torch.bfloat16:
            mixed.backward(x, x, kernels, factors, set_c, 1, 1, 1, 0, True, False, False)
            splits = [96, 64, 32, 32, 32]
            grouped.forward(x, own, set_c, splits, 1, 1, 32, 0)
            grouped.backward(x, x, own, set_c, splits, 1, 1, 32, 0, True, True)
    return [
        (f"{NAMES[dtype]}-{kind}" if "WIDTHS" in launch[1] else NAMES[dtype], launch, index in firsts)
        for index, launch in enumerate(launches)
    ]


def source_of(kernel: JITFunction, arguments: dict[str, Any]) -> ASTSource:
    """What Triton's own binder makes of the arguments: tensors of the allocator are aligned to 16 bytes and more."""
    signature: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    aligned = [["tt.divisibility", 16]]
    for position, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or one:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, tuple):
            signature[parameter.name] = tuple("*" + NAMES[x.dtype] for x in value)
            attributes |= {(position, index): aligned for index in range(len(value))}
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + NAMES[value.dtype]
            attributes[(position,)] = aligned
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if value < 2**31 else "i64"
            if not parameter.do_not_specialize and value % 16 == 0:
                attributes[(position,)] = aligned
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def compiled(kernel: JITFunction, arguments: dict[str, Any], options: dict[str, int], arch: int) -> CompiledKernel:
    return triton.compile(source_of(kernel, arguments), target=GPUTarget("cuda", arch, 32), options=options)


def resources(kernel: JITFunction, arguments: dict[str, Any], options: dict[str, int], arch: int) -> dict[str, Any]:
    result = compiled(kernel, arguments, options, arch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(result.asm["cubin"])
        cubin.flush()
        text = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    used = {key.lower(): int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    ptx = result.asm["ptx"]
    narrow = len(re.findall(r"ld\.global\.b16|ld\.global\.b8", ptx))  # one element of a 16-bit map at a time
    products = "wgmma" if "wgmma.mma_async" in ptx else "mma" if "mma.sync" in ptx else ""
    return {
        **used, "shared": result.metadata.shared, "narrow_loads": narrow, "wide_loads": ptx.count("ld.global.v4"),
        "products": products, "async_loads": len(re.findall(r"cp\.async\.c[ag]\.shared\.global .*, 0x10", ptx)),
    }  # fmt: skip


def serialised(ptx: str) -> bool:
    """Whether ptxas says that on Hopper every ``wgmma`` waits for the one before; it names one of several reasons."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as source:
        source.write(ptx)
        source.flush()
        command = [PTXAS, "-v", "-arch=sm_90a", source.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True)
    return "wgmma.mma_async instructions are serialized" in said.stdout + said.stderr


def main(archs: list[int]) -> None:
    report: dict[str, Any] = {}
    for dtype, layout in ((torch.bfloat16, "nchw"), (torch.bfloat16, "nhwc"), (torch.float32, "nchw")):
        memory_format = torch.channels_last if layout == "nhwc" else torch.contiguous_format
        for kernel, arguments, options in recorded_launches(dtype, memory_format):
            module = kernel.fn.__module__.rpartition(".")[2].strip("_")
            name = f"{module}.{kernel.fn.__name__}"
            if any(isinstance(value, tuple) for value in arguments.values()):
                name += f"-{NAMES[dtype]}" + (f"-{layout}" if module != "mix" else "")
            elif "SQUARE" in arguments:
                name += f"-{NAMES[dtype]}" + ("" if arguments["SQUARE"] else "-any-gamma")
            for arch in archs:
                if f"{name}-sm{arch}" not in report:
                    report[f"{name}-sm{arch}"] = resources(kernel, arguments, options, arch)
    for arch in archs:
        for dtype, precision in PRODUCTS:
            for label, (kernel, arguments, options), first in recorded_convolutions(dtype, precision, arch):
                name = f"dilation_conv.{kernel.fn.__name__}-{label}"
                if "WIDTHS" in arguments:
                    sums = arguments["SUMS"] if "SUMS" in arguments else (arguments["BLOCK_K"],)
                    rows, terms = ("+".join(map(str, widths)) for widths in (arguments["WIDTHS"], sums))
                    name += f"-{arguments['BLOCK_M']}x{rows}x{terms}-{options['num_warps']}w-{options['num_stages']}s"
                if f"{name}-sm{arch}" not in report:
                    report[f"{name}-sm{arch}"] = resources(kernel, arguments, options, arch)
                row = report[f"{name}-sm{arch}"]
                if first and dtype != torch.float16 and row["products"] == "wgmma" and "serialised" not in row:
                    row["serialised"] = serialised(compiled(kernel, arguments, options, arch).asm["ptx"])
    print(json.dumps(report))


if __name__ == "__main__":
    main([int(arch) for arch in sys.argv[1:]])
