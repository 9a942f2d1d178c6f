"""inspect-encoder: what it says is what torch, open_clip and transformers know of the same files; nothing runs."""

import json
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from conftest import write_encoder
from encoder_runs import CLIPS, write_run
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPVisionConfig, CLIPVisionModel

from encoders.errors import ModelError
from encoders.inspection.command import describe, differences, table
from encoders.weights.headers import read_header
from encoders.weights.values import is_folded, non_finite

OPEN_CLIP: dict[str, Any] = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1},
}
LIKE_CLIPS = {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True, "norm_kwargs": {"eps": 1e-6}}
PREPROCESS = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear", "resize_mode": "squash"}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}


@pytest.fixture
def encoder(tiny_encoder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_encoder, tmp_path / "encoder"))


def open_clip_folder(folder: Path, form: str, **vision: Any) -> tuple[Path, torch.nn.Module]:
    """A folder in the Hub's layout with open_clip's own random model, and that model."""
    torch.manual_seed(0)
    config = {**OPEN_CLIP, "vision_cfg": OPEN_CLIP["vision_cfg"] | vision}
    model = open_clip.CLIP(**config)
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": PREPROCESS}))
    if form == "safetensors":
        save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    else:
        state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
        torch.save({"epoch": 3, "state_dict": state}, folder / "open_clip_pytorch_model.bin")
    return folder, model


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_an_open_clip_folder(tmp_path: Path, form: str) -> None:
    folder, model = open_clip_folder(tmp_path / "clips", form, **LIKE_CLIPS)
    seen = describe(folder)
    own = sum(tensor.numel() for tensor in model.visual.state_dict().values())
    assert (seen.family, seen.parameters, seen.key_layout) == ("open_clip (clipa)", own, "visual.* (open_clip)")
    assert (seen.image_size, seen.patch_size, seen.layers, seen.width) == (32, 8, 2, 64)
    assert (seen.heads, seen.mlp_width, seen.activation, seen.norm_eps) == (2, 256, "quick_gelu", 1e-6)
    assert (seen.norm_before_blocks, seen.pooling) == ("no", "mean of patch tokens, then the norm")
    assert (seen.mean, seen.std, seen.resize) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear, squash")
    assert seen.position_table == "17 rows: class + 4 x 4 patches"
    assert seen.loads_on.startswith("none as it is; export-encoder")
    assert seen.problems == ()


def test_a_file_without_a_config_states_only_what_its_shapes_say(tmp_path: Path) -> None:
    folder, _ = open_clip_folder(tmp_path / "clip", "bin")
    file = (folder / "open_clip_pytorch_model.bin").rename(tmp_path / "epoch_3.pt")
    seen = describe(file)
    assert (seen.family, seen.width, seen.patch_size, seen.norm_before_blocks) == ("weights only", 64, 8, "yes")
    assert (seen.activation, seen.norm_eps, seen.heads, seen.image_size, seen.mean) == (None,) * 5
    assert "not stated" in table(["x"], [seen])


def test_a_run_and_its_export_line_up(tmp_path: Path) -> None:
    from encoders.export.command import export

    run = write_run(tmp_path / "run", **CLIPS)
    export(run, tmp_path / "out")
    before, after = describe(run), describe(tmp_path / "out", full=True)
    assert before.family == "encoder-run (clip)"
    assert (before.norm_before_blocks, after.norm_before_blocks[:11]) == ("no", "folded away")
    assert after.finite == "yes"
    assert after.problems == ()
    expected = {"family", "parameters", "norm_before_blocks", "key_layout", "finite", "loads_on"}
    assert set(differences(before, after)) == expected
    lines = table(["run", "out"], [before, after]).splitlines()
    assert {line[2:].split("  ")[0].replace(" ", "_") for line in lines if line.startswith("* ")} == expected


def test_transformers_own_folders_and_on_which_versions_they_load(tmp_path: Path, tiny_llava: Path) -> None:
    config = CLIPVisionConfig(**VISION, image_size=32, hidden_act="gelu")
    CLIPVisionModel(config).save_pretrained(tmp_path / "bare")  # transformers 5 drops the prefix
    two = CLIPModel.config_class(
        vision_config=config.to_dict(), text_config={"hidden_size": 32, "num_hidden_layers": 1}
    )
    clip = CLIPModel(two)
    clip.save_pretrained(tmp_path / "clip")
    bare, whole, llava = (describe(folder) for folder in (tmp_path / "bare", tmp_path / "clip", tiny_llava))
    assert bare.loads_on.startswith("transformers >= 5.6; older ones fill all of it at random")
    assert (whole.family, whole.loads_on) == ("clip", "transformers 4.37 to 5.23")
    assert whole.parameters == sum(p.numel() for p in clip.vision_model.parameters())
    assert (llava.family, llava.loads_on) == ("llava", "transformers 4.37 to 5.23, as part of its LLaVA")
    assert (llava.layers, llava.mean, llava.dtype) == (3, (0.4, 0.5, 0.6), "F32")
    for seen in (bare, whole, llava):
        assert seen.problems == ()
        assert (seen.activation, seen.pooling) == ("gelu", None if seen is llava else "class token, normed")
    state = load_file(tmp_path / "bare" / "model.safetensors")
    save_file({f"vision_model.{name}": value for name, value in state.items()}, tmp_path / "bare" / "model.safetensors")
    assert describe(tmp_path / "bare").loads_on.startswith(
        "transformers >= 4.57; older ones stop at the missing metadata"
    )


def set_in(name: str, **values: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return spoil


def without(*names: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        for name in names:
            del state[f"vision_model.{name}"]
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


def shaped(name: str, *shape: int) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        state[f"vision_model.{name}"] = torch.zeros(shape)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


SHAPES = [
    ("encoder.layers.0.self_attn.q_proj.weight", (3, 5), "q_proj.weight has the shape [3, 5], needed is [32, 32]"),
    ("encoder.layers.2.mlp.fc2.weight", (64, 32), "fc2.weight has the shape [64, 32], needed is [32, 64]"),
    ("encoder.layers.0.mlp.fc1.weight", (), "fc1.weight has the shape [], needed is [M, 32]"),
    ("embeddings.patch_embedding.weight", (32, 3, 16, 8), "has the shape [32, 3, 16, 8], needed is [32, 3, 8, 8]"),
    ("embeddings.position_embedding.weight", (17, 99), "has the shape [17, 99], needed is [17, 32]"),
    ("embeddings.position_embedding.weight", (17,), "has the shape [17], needed is [17, 32]"),
    ("pre_layrnorm.weight", (0,), "pre_layrnorm.weight has the shape [0], needed is [32]"),
]
PROBLEMS: list[tuple[Callable[[Path], None], str]] = [
    (set_in("config.json", image_size=48), "needs a position table of 37 rows, the weights have 17 (32 px)"),
    (set_in("config.json", hidden_size=64), "the config says width 64, the weights have 32"),
    (set_in("config.json", num_hidden_layers=4), "the config says layers 4, the weights have 3"),
    (set_in("config.json", patch_size=16), "the config says patch_size 16, the weights have 8"),
    (set_in("config.json", auto_map={"AutoModel": "x.Y"}), "has an auto_map"),
    (set_in("config.json", model_type="siglip_vision_model"), "describes a SigLIP tower"),
    (
        set_in("preprocessor_config.json", crop_size={"height": 24, "width": 24}),
        "gives 24 x 24 px, the tower takes 32 x 32",
    ),
    (set_in("preprocessor_config.json", size={"height": 48, "width": 32}, do_center_crop=False), "gives 48 x 32 px"),
    (set_in("preprocessor_config.json", do_center_crop=False), "gives pictures of any shape"),
    *((shaped(name, *shape), problem) for name, shape, problem in SHAPES),
    (
        without("pre_layrnorm.weight", "pre_layrnorm.bias"),
        "the config needs a norm before the blocks, the file has none",
    ),
    (
        without("encoder.layers.1.self_attn.q_proj.bias"),
        "1 tensors are missing (encoder.layers.1.self_attn.q_proj.bias)",
    ),
    (without("pre_layrnorm.bias"), "1 tensors are missing (pre_layrnorm.bias)"),
    (without("embeddings.class_embedding"), "no class token, which CLIPVisionModel always has"),
]


@pytest.mark.parametrize(("spoil", "problem"), PROBLEMS, ids=[problem[:40] for _, problem in PROBLEMS])
def test_what_disagrees_is_named(encoder: Path, spoil: Callable[[Path], None], problem: str) -> None:
    assert describe(encoder).problems == ()
    spoil(encoder)
    seen = describe(encoder)
    assert any(problem in found for found in seen.problems), seen.problems
    assert seen.loads_on == "none safely: see problems"


SQUARE, CROP = {"height": 64, "width": 64}, {"height": 32, "width": 32}
PICTURES: list[tuple[dict[str, Any], str | None]] = [
    ({"size": {"shortest_edge": 32}, "resample": 1, "crop_size": CROP}, "lanczos, shortest edge + center crop"),
    ({"size": 32, "resample": 3, "crop_size": 32}, "bicubic, shortest edge + center crop"),
    ({"size": CROP, "do_center_crop": False}, "filter not stated, squash"),
    ({"size": SQUARE, "crop_size": CROP, "resample": 2}, "bilinear, squash + center crop"),
    ({"do_resize": False, "crop_size": CROP}, "filter not stated, none + center crop"),
    ({"crop_size": CROP}, None),
]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("processor", "resize"), PICTURES)
def test_what_the_image_processor_does(
    encoder: Path, processor: dict[str, Any], resize: str | None, nested: bool
) -> None:
    (encoder / "preprocessor_config.json").unlink()
    values = {**processor, "image_mean": [0.1, 0.2, 0.3]}
    name = "processor_config.json" if nested else "preprocessor_config.json"
    (encoder / name).write_text(json.dumps({"image_processor": values} if nested else values))
    seen = describe(encoder)
    assert (seen.resize, seen.mean, seen.problems) == (resize, (0.1, 0.2, 0.3), ())
    config = json.loads((encoder / "config.json").read_text())
    del config["image_size"]  # the position table still tells
    (encoder / "config.json").write_text(json.dumps(config))
    assert describe(encoder).problems == ()


def test_a_folded_encoder_in_float16_is_broken(tmp_path: Path) -> None:
    from encoders.export.command import export

    export(write_run(tmp_path / "run", **CLIPS), tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    for dtype, broken in ((torch.bfloat16, False), (torch.float16, True)):
        save_file({n: t.to(dtype) for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
        seen = describe(tmp_path / "out")
        assert seen.norm_before_blocks.startswith("folded away")
        assert any("folded and stored in float16" in problem for problem in seen.problems) == broken


@pytest.mark.parametrize(
    ("told", "since"),
    [([{"format": "pt"}] * 2, "4.37"), ([{"format": "pt"}, None], ">= 4.57"), ([{"format": "np"}] * 2, ">= 4.57")],
)
def test_every_shard_must_say_its_format(encoder: Path, told: list[dict[str, str] | None], since: str) -> None:
    state = load_file(encoder / "model.safetensors")
    (encoder / "model.safetensors").unlink()
    placed = {}
    for n, metadata in enumerate(told):
        part = {name: tensor for i, (name, tensor) in enumerate(sorted(state.items())) if i % 2 == n}
        save_file(part, encoder / f"model-{n}.safetensors", metadata=metadata)
        placed |= dict.fromkeys(part, f"model-{n}.safetensors")
    (encoder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    assert describe(encoder).loads_on.startswith(f"transformers {since}")


def test_what_was_not_measured_is_not_claimed(tiny_llava: Path, tmp_path: Path) -> None:
    llava = Path(shutil.copytree(tiny_llava, tmp_path / "llava"))
    set_in("config.json", model_type="llava_next")(llava)
    assert describe(llava).loads_on == "not measured for llava_next"


def test_names_and_words_of_files_do_not_steer_the_terminal(encoder: Path) -> None:
    set_in("config.json", hidden_act="\x1b[31mgelu\n  loads on  all")(encoder)
    printed = table([""], [describe(encoder)])
    assert "\\x1b[31mgelu\\n  loads on  all" in printed
    assert "\x1b" not in printed


def test_towers_that_are_none_are_refused(tmp_path: Path) -> None:
    save_file({"visual.trunk.patch_embed.proj.weight": torch.zeros(8, 3, 4, 4)}, tmp_path / "siglip.safetensors")
    with pytest.raises(ModelError, match=r"holds no ViT image tower .* \(ResNet, timm, SigLIP\)"):
        describe(tmp_path / "siglip.safetensors")
    folder, _ = open_clip_folder(tmp_path / "coca", "safetensors")
    raw = json.loads((folder / "open_clip_config.json").read_text())
    raw["model_cfg"]["vision_cfg"]["attentional_pool"] = True
    (folder / "open_clip_config.json").write_text(json.dumps(raw))
    assert "attention pool" in describe(folder).problems[0]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-X", "importtime", "-m", "encoders.inspection.command", *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=300)


def test_the_command_needs_neither_torch_nor_numpy(encoder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(encoder, tmp_path / "other"))
    set_in("config.json", hidden_act="quick_gelu")(other)
    finished = command(str(encoder), "--json")
    assert finished.returncode == 0, finished.stderr[-1000:]
    assert json.loads(finished.stdout)["activation"] == "gelu"
    loaded = {line.split("|")[-1].strip() for line in finished.stderr.splitlines() if line.startswith("import time:")}
    assert not loaded & {"torch", "transformers", "numpy", "safetensors", "huggingface_hub"}
    assert command(str(encoder), "--diff", str(encoder)).returncode == 0
    compared = command(str(encoder), "--diff", str(other))
    assert compared.returncode == 1
    assert [line.split()[1] for line in compared.stdout.splitlines() if line.startswith("* ")] == ["activation"]
    assert command(str(tmp_path / "nothing")).returncode == 4
    assert "hf download openai/clip --local-dir" in command("openai/clip").stderr


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["safetensors", "pt"])
def test_values_that_are_not_finite_are_counted(tmp_path: Path, dtype: torch.dtype, form: str) -> None:
    torch.manual_seed(0)
    largest = torch.finfo(dtype).max
    state = {"whole": torch.randn(700, 900).to(dtype), "broken": torch.randn(700, 900).to(dtype)}
    state["whole"][0, :3] = torch.tensor([largest, -largest, torch.finfo(dtype).tiny], dtype=dtype)
    state["broken"].view(-1)[[0, 77, -1]] = torch.tensor([float("nan"), float("inf"), -float("inf")], dtype=dtype)
    state["count"] = torch.full((3,), -1)  # all bits set, and a whole number
    file = tmp_path / f"weights.{form}"
    save_file(state, file) if form == "safetensors" else torch.save(state, file)
    header = read_header(file)
    assert non_finite(header.tensors) == {"broken": 3}
    raw = file.read_bytes()
    for name, tensor in state.items():  # the bytes are where the header says
        placed = header.tensors[name]
        assert placed.shape == tuple(tensor.shape)
        assert raw[placed.start : placed.start + placed.size] == tensor.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_folded_norm_is_told_from_a_trained_and_from_a_fresh_one(tmp_path: Path, dtype: torch.dtype) -> None:
    norms = {
        "folded": (torch.full((8,), 2.0**12), torch.zeros(8)),
        "fresh": (torch.ones(8), torch.zeros(8)),
        "constant": (torch.full((8,), 3.0), torch.zeros(8)),
        "trained": (torch.rand(8) + 200, torch.zeros(8)),
        "biased": (torch.full((8,), 2.0**12), torch.ones(8)),
    }
    state = {f"{n}.{part}": t.to(dtype) for n, pair in norms.items() for part, t in zip("wb", pair, strict=True)}
    save_file(state, tmp_path / "norms.safetensors")
    tensors = read_header(tmp_path / "norms.safetensors").tensors
    assert [name for name in norms if is_folded(tensors[f"{name}.w"], tensors[f"{name}.b"])] == ["folded"]


class Canary:
    """Pickled, a call that leaves a file behind."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.file}",)


def header_of(length: int, content: bytes = b"{}") -> Callable[[Path, Path], object]:
    return lambda file, canary: file.write_bytes(struct.pack("<Q", length) + content)


def tar_of_pickle(file: Path, canary: Path) -> None:
    inner = file.with_suffix(".pickle")
    inner.write_bytes(pickle.dumps(Canary(canary)))
    with tarfile.open(file, "w") as archive:
        archive.add(inner, "pickle")


TENSOR = {"visual.conv1.weight": {"dtype": "F32", "shape": [8, 3, 4, 4], "data_offsets": [0, 1536]}}
HOSTILE: list[tuple[str, str, Callable[[Path, Path], object], str]] = [
    ("zip", "x.pt", lambda f, c: torch.save({"a": torch.ones(2), "b": Canary(c)}, f), r"asks for posix\.system"),
    ("pickle", "x.pt", lambda f, c: f.write_bytes(pickle.dumps(Canary(c))), "neither a safetensors file nor a zip"),
    ("tar", "x.pt", tar_of_pickle, "neither a safetensors file nor a zip"),
    ("disguised", "x.safetensors", lambda f, c: torch.save(Canary(c), f), r"asks for posix\.system"),
    ("length", "x.safetensors", header_of(2**62), "its header claims"),
    ("11 MB", "x.safetensors", header_of(11 * 2**20, b"{}".ljust(11 * 2**20)), "its header claims"),
    (
        "pointer",
        "x.safetensors",
        lambda f, c: f.write_text("version https://git-lfs.github.com/spec/v1\n"),
        "git lfs pull",
    ),
    ("metadata", "x.safetensors", header_of(20, b'{"__metadata__": []} '), "damaged header"),
    ("number", "x.safetensors", header_of(31, b'{"__metadata__": {"format": 3}}'), "damaged header"),
    ("deep", "x.safetensors", header_of(10**5, b"[" * 10**5), "damaged header"),
    ("cut", "x.safetensors", header_of(len(json.dumps(TENSOR)), json.dumps(TENSOR).encode()), "ends past its"),
    ("json", "x.safetensors", header_of(2, b"[]"), "damaged header"),
    (
        "index",
        "x.index.json",
        lambda f, c: f.write_text('{"weight_map": {"a": "../b"}}'),
        "not a file of weights beside it",
    ),
    ("module", "x.pt", lambda f, c: torch.save(torch.nn.Linear(2, 2), f), r"asks for torch\.nn\.modules"),
]


@pytest.mark.parametrize(("name", "write", "match"), [case[1:] for case in HOSTILE], ids=[case[0] for case in HOSTILE])
def test_hostile_files_are_refused_and_nothing_runs(
    tmp_path: Path, name: str, write: Callable[[Path, Path], object], match: str
) -> None:
    canary = tmp_path / "canary"
    write(tmp_path / name, canary)
    with pytest.raises(ModelError, match=match):
        describe(tmp_path / name)
    assert not canary.exists()


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_damage_is_an_error_of_ours_whatever_byte_it_hits(tmp_path: Path, form: str) -> None:
    folder, _ = open_clip_folder(tmp_path / "clip", form)
    file = next(folder.glob("open_clip_*model*"))
    whole, dice = file.read_bytes(), random.Random(0)
    pickled = whole.find(b"data.pkl") if form == "bin" else 0
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(dice.randint(1, 4)):
            damaged[pickled + dice.randrange(4000)] = dice.randrange(256)
        file.write_bytes(damaged[: dice.choice([len(whole), len(whole), dice.randrange(len(whole))])])
        with suppress(ModelError):
            describe(folder, full=True)


ODD: list[Any] = [
    None,
    [],
    {},
    "",
    "48",
    0,
    -1,
    True,
    1e400,
    [3],
    ["a"],
    {"height": "x"},
    {"shortest_edge": []},
    10**30,
]


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "encoder.json", "model.safetensors"])
def test_no_config_or_header_however_odd_ends_in_a_traceback(tmp_path: Path, name: str) -> None:
    from encoders.export.command import export

    export(write_run(tmp_path / "run"), tmp_path / "out")
    file, dice = tmp_path / "out" / name, random.Random(0)
    whole = file.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0] if name == "model.safetensors" else 0
    content = json.loads(whole[8 : 8 + length] if length else whole)
    places = list(spots(content))
    for place in places if len(places) < 200 else dice.sample(places, 200):
        changed = json.loads(json.dumps(content))
        spot = changed
        for key in place[:-1]:
            spot = spot[key]
        spot[place[-1]] = dice.choice(ODD)
        raw = json.dumps(changed).encode()
        file.write_bytes(struct.pack("<Q", len(raw)) + raw + whole[8 + length :] if length else raw)
        with suppress(ModelError):
            table(["x"], [describe(tmp_path / "out", full=length > 0)])
    for _ in range(100):
        raw = bytearray(whole[8 : 8 + length] if length else whole)
        raw[dice.randrange(len(raw))] = dice.randrange(256)
        file.write_bytes(whole[:8] + raw + whole[8 + length :] if length else raw)
        with suppress(ModelError):
            describe(tmp_path / "out")


def spots(value: Any) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside a JSON value."""
    for key, each in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (key,)
        yield from ((key, *inner) for inner in spots(each))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("installed", "bare_loads", "without_metadata_loads"),
    [
        (("transformers==4.46.3", "huggingface_hub==0.26.5", "tokenizers==0.20.3"), False, False),
        (("transformers==4.57.6", "huggingface_hub==0.36.0", "tokenizers==0.22.1"), False, True),
        (("transformers==5.5.4", "huggingface_hub==1.9.0", "tokenizers==0.22.1"), False, True),
        (("transformers==5.6.0", "huggingface_hub==1.9.0", "tokenizers==0.22.1"), True, True),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_the_rules_hold_on_the_versions_that_they_name(
    tmp_path: Path, installed: tuple[str, ...], bare_loads: bool, without_metadata_loads: bool
) -> None:
    side = tmp_path / "side"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(side), *installed]
    subprocess.run(pip, check=True, timeout=600)
    write_encoder(tmp_path / "portable")
    state = load_file(tmp_path / "portable" / "model.safetensors")
    flat = {name.removeprefix("vision_model."): value for name, value in state.items()}
    for name, tensors, metadata in (("bare", flat, {"format": "pt"}), ("silent", state, None)):
        shutil.copytree(tmp_path / "portable", tmp_path / name)
        save_file(tensors, tmp_path / name / "model.safetensors", metadata=metadata)
    script = """
import sys
from transformers import CLIPVisionModel
for folder in sys.argv[1:]:
    try:
        info = CLIPVisionModel.from_pretrained(folder, output_loading_info=True)[1]
        print(not any(len(found) for found in info.values()))
    except AttributeError:
        print(False)
"""
    folders = [str(tmp_path / name) for name in ("portable", "bare", "silent")]
    line = [sys.executable, "-c", script, *folders]
    finished = subprocess.run(line, env={**os.environ, "PYTHONPATH": str(side)}, capture_output=True, text=True)
    assert finished.stdout.split() == [str(loads) for loads in (True, bare_loads, without_metadata_loads)], (
        finished.stderr
    )
