"""What Triton's kernels are compiled for, and that they compile for real GPUs: none is needed for that."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import device_of, with_triton

pytest.importorskip("triton", reason="PyTorch's builds without CUDA come without Triton")

from syncbn.kernels.launch import Kernel
from syncbn.kernels.tiling import RUN, VECTORS, WIDTHS, tiling

MOST_TILES = sum(len(widths) for widths in WIDTHS.values()) * len(VECTORS)


def random_shapes(count: int) -> list[tuple[int, int, int, bool]]:
    """Images, channels, places and layout: from vectors to volumes."""
    draw = random.Random(0)
    shapes = []
    for _ in range(count):
        channels = draw.choice([draw.randint(1, 3000), 2 ** draw.randint(0, 12)])
        places = draw.choice([1, draw.randint(2, 300), (32 * draw.randint(1, 40)) ** 2, 8 ** draw.randint(1, 8)])
        shapes.append((draw.randint(1, 64), channels, places, draw.random() < 0.5))
    return shapes


def test_any_shape_is_cut_into_one_of_36_kinds_of_tiles() -> None:
    kinds = set()
    for shape in random_shapes(20_000):
        tiles = tiling(*shape, aligned=True)
        kinds.add((tiles.channels_last, tiles.vector, tiles.block_s, tiles.block_c))
    assert MOST_TILES == 36
    assert 20 < len(kinds) <= MOST_TILES


def test_tiles_cover_the_tensor_and_shares_the_tiles() -> None:
    for images, channels, places, channels_last in random_shapes(2000):
        tiles = tiling(images, channels, places, channels_last, aligned=True)
        assert tiles.images * tiles.places == images * places
        assert 0 <= tiles.tiles_per_image * tiles.block_s - tiles.places < tiles.block_s
        assert 0 <= tiles.channel_blocks * tiles.block_c - channels < tiles.block_c
        along = channels if channels_last else places
        assert along % tiles.vector == 0
        for programs in (1, 100, 1056):
            splits, share = tiles.shares(programs, RUN)
            assert 1 <= share <= RUN
            assert splits * share >= tiles.tiles > (splits - 1) * share
            assert splits * tiles.channel_blocks <= programs or splits == 1 or share == RUN


@pytest.mark.parametrize(
    ("shape", "channels_last"),
    [
        ((2, 64, 400 * 672), False),
        ((2, 64, 400 * 672), True),
        ((2, 2048, 7 * 7), False),
        ((2, 2048, 7 * 7), True),
        ((4096, 1024, 1), True),
        ((2, 32, 128**3), False),
    ],
    ids=str,
)
def test_every_multiprocessor_of_a_large_gpu_has_work(shape: tuple[int, int, int], channels_last: bool) -> None:
    """At least half of an H200's 132 where the tensor is small, and several programs on each where it is not."""
    tiles = tiling(*shape, channels_last, aligned=True)
    splits, _ = tiles.shares(8 * 132, RUN)
    assert splits * tiles.channel_blocks >= (66 if shape[2] < 100 and shape[0] == 2 else 4 * 132)


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_tiny_tensor_takes_no_second_kernel(interpreters: Any, channels_last: bool) -> None:
    assert with_triton(interpreters, splits_of_a_tiny_tensor, channels_last) == 1


def splits_of_a_tiny_tensor(channels_last: bool) -> int:
    from syncbn.kernels import triton as backend

    backend._multiprocessors, kept = lambda device: 132, backend._multiprocessors
    try:
        backend._plan_for.cache_clear()
        return backend._plan_for(1, 64, 64, channels_last, True, None).splits
    finally:
        backend._multiprocessors = kept
        backend._plan_for.cache_clear()


def addresses(t: int, C: int, S: int, tiles_per_image: int, c0: int, constants: tuple[Any, ...]) -> list[int]:
    """Where the values of a tile are, -1 for those that do not exist."""
    import triton
    import triton.language as tl

    from syncbn.kernels.triton import _tile

    @triton.jit
    def probe(
        out_ptr, t, C, S, tiles_per_image, c0,
        LAST: tl.constexpr, VEC: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
    ):  # fmt: skip
        start, offsets, inside, _place, _present = _tile(t, C, S, tiles_per_image, c0, LAST, VEC, BLOCK_S, BLOCK_C)
        where = tl.arange(0, BLOCK_S)[:, None] * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
        tl.store(out_ptr + where, tl.where(inside, start + offsets, -1))

    probe.fn.__globals__.update(tl=tl, _tile=_tile)
    out = torch.zeros(constants[2] * constants[3], dtype=torch.int64, device=device_of("triton"))
    probe[(1,)](out, t, C, S, tiles_per_image, c0, *constants)
    return out.tolist()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(3, 2, 2**30 + 8), (2**20, 64, 49), (1, 1, 2**33), (2**12, 2**16, 16)], ids=str)
def test_addresses_beyond_2_to_31(interpreters: Any, shape: tuple[int, int, int], channels_last: bool) -> None:
    """The last tile of a tensor that is too large to be made here."""
    N, C, S = shape
    tiles = tiling(N, C, S, channels_last, aligned=True)
    t, c0 = tiles.tiles - 1, (tiles.channel_blocks - 1) * tiles.block_c
    constants = (channels_last, tiles.vector, tiles.block_s, tiles.block_c)
    actual = with_triton(interpreters, addresses, t, C, tiles.places, tiles.tiles_per_image, c0, constants)
    s0 = (tiles.tiles_per_image - 1) * tiles.block_s
    expected = []
    for s in range(s0, s0 + tiles.block_s):
        for c in range(c0, c0 + tiles.block_c):
            address = s * C + c if channels_last else ((N - 1) * C + c) * S + s
            expected.append(address if s < tiles.places and c < C else -1)
    assert max(expected) == N * C * S - 1
    assert actual == expected


def variants_after_many_shapes() -> tuple[int, int]:
    """How many kinds of tiles were met, and how many variants of a kernel that took."""
    from syncbn.kernels import triton as backend

    backend.MOMENTS.variants.clear()
    kinds = set()
    draw = random.Random(1)
    for _ in range(60):
        x = torch.empty(2, draw.randint(1, 24), draw.randint(1, 24), draw.randint(1, 24), device=device_of("triton"))
        x = x.contiguous(memory_format=draw.choice([torch.contiguous_format, torch.channels_last]))
        backend.moments(x, None, 0)
        kinds.add(backend._plan(x).constants)
    return len(kinds), len(backend.MOMENTS.variants)


def test_a_kernel_is_compiled_for_kinds_of_tiles_not_for_shapes(interpreters: Any) -> None:
    kinds, variants = with_triton(interpreters, variants_after_many_shapes)
    assert variants == kinds <= MOST_TILES


# ---- compiling for GPUs that are not there


def ahead_of_time(kernel: Kernel, dtypes: dict[str, torch.dtype], constants: tuple[Any, ...], capability: int) -> Any:
    """The compiled kernel. ``dtypes`` has the pointers that are not None."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import type_canonicalisation_dict

    *_, vector, _, _ = (None, None, 8, None, None) if len(constants) < 4 else constants
    function = kernel.aligned if vector > 1 else kernel.unaligned
    signature: dict[str, str] = {}
    values: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    given = iter(constants)
    for index, parameter in enumerate(function.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name], values[index,] = "constexpr", next(given)
        elif not name.endswith("_ptr"):
            signature[name] = parameter.annotation_type
            assert parameter.do_not_specialize
        elif name not in dtypes:
            signature[name], values[index,] = "constexpr", None
        else:
            signature[name] = "*" + type_canonicalisation_dict[str(dtypes[name]).removeprefix("torch.")]
            if not parameter.do_not_specialize_on_alignment:
                attributes[index,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=values, attrs=attributes)
    warps = 4 if vector > 2 else 8
    options = {"num_warps": warps, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def compile_kinds(dtype: torch.dtype, capability: int, every_tile: bool) -> None:
    """Every kernel, plain, for one kind of tile or for every one; and every kind of call for one kind of tile."""
    from syncbn.kernels import triton as backend

    double = torch.float64
    vectors = dict.fromkeys(("weight_ptr", "bias_ptr", "running_mean_ptr", "running_var_ptr"), torch.float32)
    own = dict.fromkeys(("rows_ptr", "message_ptr", "stats_ptr"), double) | {"tracked_ptr": torch.int64}
    plain = dict.fromkeys(("x_ptr", "y_ptr", "dy_ptr", "dx_ptr"), dtype) | vectors | own
    plain |= {"dweight_ptr": torch.float32, "dbias_ptr": torch.float32}
    added = plain | dict.fromkeys(("residual_ptr", "kept_ptr", "dresidual_ptr"), dtype)
    kinds = []
    for last, widths in WIDTHS.items():
        for width in widths:
            places, channels = (2048 // width, width) if last else (width, 2048 // width)
            kinds += [(last, 8, places, channels), (last, 1, places, channels)]
    kinds = kinds if every_tile else kinds[:1]
    jobs: list[tuple[Kernel, dict[str, torch.dtype], tuple[Any, ...]]] = [(backend.COMBINE, plain, (256, 4))]
    for kind in kinds:
        jobs += [(backend.MOMENTS, plain, kind)]
        jobs += [(each, plain, (None, *kind)) for each in (backend.NORMALIZE, backend.GRAD_MOMENTS, backend.GRAD_INPUT)]
    kind = (True, 8, 32, 64)
    masked = plain | {"mask_ptr": torch.uint8}
    jobs += [(backend.MOMENTS, masked, kind), (backend.GRAD_INPUT, masked, (None, *kind))]
    for activation in ("relu", "leaky_relu", "silu"):
        for pointers in (plain, added):
            jobs += [
                (each, pointers, (activation, *kind))
                for each in (backend.NORMALIZE, backend.GRAD_MOMENTS, backend.GRAD_INPUT)
            ]
    for kernel, pointers, constants in jobs:
        compiled = ahead_of_time(kernel, pointers, constants, capability)
        reads_tensors = kernel is not backend.COMBINE
        if reads_tensors and constants[-3] == 8:  # 16 bytes in one read, and in one write
            assert re.search(r"ld\.global\S*\.(v4\.b32|v2\.b64)", compiled.asm["ptx"]), (kernel, constants)
        # What ptxas spills it takes from here. Few bytes are its own choice, with registers to spare.
        assert local_bytes(compiled) <= 64, (kernel, pointers, constants)
    print(len(jobs), "compiled")


def local_bytes(compiled: Any) -> int:
    """The stack of a thread, in bytes."""
    import tempfile

    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"STACK:(\d+).*LOCAL:(\d+)", usage)
    assert found is not None, usage
    return int(found[1]) + int(found[2])


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, all other tests compile them")
@pytest.mark.parametrize(
    ("dtype", "capability"), [("bfloat16", 90), ("float32", 80), ("float16", 75), ("float64", 100)], ids=str
)
def test_every_kernel_compiles(tmp_path: Path, dtype: str, capability: int) -> None:
    """With the compiler that comes with Triton, in a process where nothing is interpreted or found in a cache."""
    program = f"import torch, test_triton; test_triton.compile_kinds(torch.{dtype}, {capability}, {capability == 90})"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert re.fullmatch(r"\d+ compiled\n", run.stdout)
    assert "FP_FUSION" not in run.stderr, "Triton asks for a choice that is ours"
