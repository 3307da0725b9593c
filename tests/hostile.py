"""Input that is damaged, strange or means harm, one row for each: `python tests/hostile.py` prints `tried N, held M`.

A row makes its input in an empty folder, which is the current one, and gives it to the package. It holds if it comes
to its end: a right value, or a refusal in one short line of one of the package's error types, with status 2 and
nothing written where it came through the command line. `@row` appends one, `@row(**each(...))` one for each value.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

sys.path.append(str(Path(__file__).parent / "support"))  # where this runs as a script
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import datasets
import torch
from accelerate.state import AcceleratorState
from card_texts import BENIGN, HOSTILE, cards, outline, python_blocks
from command_words import last_of_each
from conftest import CLASS_NAMES, make_clip, make_processor
from datasets import ClassLabel, Dataset, Features, Image
from peft import LoraConfig, get_peft_model
from PIL import Image as Pictures
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from hf_robust_clip import TTC, CLIPForZeroShotClassification, DefendedClassifier, cli
from hf_robust_clip.report import load_reports
from hf_robust_clip.runs.shared import load_model
from hf_robust_clip.zero_shot_data.loading import load_image_dataset

CONFIGS = Path(__file__).parents[1] / "recipes/configs"
EVALUATION, TRAINING = CONFIGS / "evaluate.yaml", CONFIGS / "digits-clip/pmg_aft.yaml"
SMALL = (
    "--dataset_name",
    "digits",
    "--max_images",
    "2",
    "--evaluation.attacks",
    "pgd-1",
    "--evaluation.radii",
    "[1/255]",
    "--use_cpu",
)
ERRORS = (ValueError, TypeError, OSError, FloatingPointError)
LONGEST = 900  # characters of a line that refuses
ROWS: dict[str, Callable[[], object]] = {}
SECONDS: dict[str, float] = {}


def row(check: Callable[..., object] | None = None, **cases: object) -> Callable:
    """Append a function as a row by its name; with `cases` one row for each, which the function gets."""

    def append(check: Callable[..., object]) -> Callable[..., object]:
        name = check.__name__.replace("_", " ")
        for case, value in cases.items():
            ROWS[f"{name}: {case}"] = lambda value=value: check(value)
        if not cases:
            ROWS[name] = check
        return check

    return append if check is None else append(check)


def each(*values: object) -> dict[str, object]:
    """Cases that are called as they are written, long ones by their beginning and length."""
    names = [repr(value) for value in values]
    return {n if len(n) < 99 else f"{n[:30]}... ({len(n)})": value for n, value in zip(names, values, strict=True)}


def refused(call: Callable[[], object], *words: str) -> None:
    """Let a call fail in one short line that holds the words."""
    try:
        found = call()
    except ERRORS as error:
        check_line(str(error), *words)
    else:
        raise AssertionError(f"taken: {found!r:.200}")


def check_line(line: str, *words: str) -> None:
    assert line.strip() and len(line.strip().splitlines()) == 1 and len(line) <= LONGEST, (
        f"no short line: {line:.2000}"
    )
    assert all(word in line for word in words), f"{words} not all in: {line}"


def command(*words: str) -> tuple[int, str, str]:
    """Status, output and errors of a command line, run in this process."""
    out, error, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            cli.main(list(words))
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
    return status, out.getvalue(), error.getvalue()


def evaluate(*words: str, config: Path | str = EVALUATION) -> tuple[int, str, str]:
    return command("evaluate", *last_of_each("--config", config, *SMALL, *words))


def train(*words: str, config: Path | str = TRAINING) -> tuple[int, str, str]:
    small = ("--max_images", "8", "--max_steps", "1", "--use_cpu")
    return command("train", *last_of_each("--config", config, *small, *words))


def ends(done: tuple[int, str, str], *words: str) -> None:
    """Check that a command ended with status 2 and one line that holds the words, and wrote no results."""
    status, _, error = done
    assert status == 2 and error.startswith(("error: ", "\nerror: ")), (status, error[-2000:])
    check_line(error, *words)
    written = [path for path in Path().rglob("*") if path.name in ("report.json", "README.md", "recipe.yaml")]
    assert not [path for path in written if "mine" not in path.parts], written


def edit(file: Path, *keys: str, value: object) -> None:
    """Put a value into a JSON file, under its keys."""
    content = inner = json.loads(file.read_text())
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    file.write_text(json.dumps(content))


def model_in(folder: str = "model") -> Path:
    """A folder with a whole tiny model."""
    processor = make_processor()
    CLIPForZeroShotClassification.from_clip(make_clip(processor), processor).save_pretrained(folder)
    return Path(folder)


def adapter_in(folder: str = "adapter", base: str = "model") -> Path:
    """A folder with an adapter on the model of another one."""
    lora = LoraConfig(r=2, target_modules=r".*vision_model.*q_proj")
    get_peft_model(load(model_in(base)), lora).save_pretrained(folder)
    edit(Path(folder, "adapter_config.json"), "base_model_name_or_path", value=base)
    return Path(folder)


def load(name: Path | str) -> CLIPForZeroShotClassification:
    return CLIPForZeroShotClassification.from_pretrained(name)


def refuses_model(folder: Path, *words: str) -> None:
    """A folder that neither of the two ways to load takes."""
    refused(lambda: load(folder), *words)
    refused(lambda: load_model(str(folder)), *words)


def picture(path: str | Path, size: tuple[int, int] = (8, 8)) -> Path:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Pictures.new("RGB", size, (200, 10, 30)).save(path)
    return Path(path)


def parquet(path: str | Path, **changes: object) -> Path:
    """A parquet file of two pictures and two classes."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    images = [Pictures.new("RGB", (8, 8), (grey, grey, grey)) for grey in (10, 200)]
    features = Features({"image": Image(), "label": ClassLabel(names=["dark", "light"])})
    Dataset.from_dict({"image": images, "label": [0, 1], **changes}, features=features).to_parquet(path)
    return Path(path)


def data(folder: str | Path, split: str = "test", **changes: object):
    return load_image_dataset(str(folder), split, make_processor(), **changes)


# ---- texts on the command line, YAML


@row(**each("010", "12:30", "2024-01-01", "no", "{}", "1e3", "0x1F", "[a]", "~", "a: b", "# x", "1_000", ".inf", "&a"))
def an_output_folder_is_what_was_typed(text: str) -> None:
    Path(text).mkdir()
    Path(text, "mine").touch()
    ends(evaluate("--output_dir", text), repr(text), "not empty")


@row(**each("010", "12:30", "2024-01-01", "no", "1e3"))
def an_output_folder_in_a_file_is_what_was_written(text: str) -> None:
    Path(text).mkdir()
    Path(text, "mine").touch()
    own = EVALUATION.read_text().partition("\noutput_dir:")[0] + f"\noutput_dir: {text}\n"
    Path("own.yaml").write_text(own)
    ends(evaluate(config="own.yaml"), repr(text), "not empty")


@row(**each("010", "no", "2024-01-01", "12:30"))
def the_name_of_a_task_is_what_was_written(text: str) -> None:
    tasks = f"[{{name: {text}, dataset: digits}}, {{name: {text}, dataset: digits}}]"
    ends(command("evaluate", "--config", str(EVALUATION), "--tasks", tasks, "--output_dir", "out"), repr(text))


@row(
    list_for_a_text="output_dir: [a]",
    mapping_for_a_text="output_dir: {a: b}",
    text_for_a_section="evaluation: a",
    list_for_a_section="evaluation: [a]",
    repeated_key="output_dir: a\noutput_dir: b",
    repeated_inner_key="evaluation: {seed: 1, seed: 2}",
    number="12",
    cut_short="tasks: {dataset: ",
    tag="output_dir: !!python/object/apply:os.system [touch owned]",
    unknown_alias="output_dir: *nothing",
    holds_itself="evaluation: &a {radii: *a}",
    two_documents="output_dir: a\n---\noutput_dir: b",
    control="output_dir: a\x01",
    tab="evaluation:\n\tradii: a",
    deep="tasks: " + "[" * 3000 + "]" * 3000,
    long_integer="output_dir: out\nevaluation: {seed: " + "9" * 10000 + "}",
    key_that_is_a_list="? [a, b]\n: c",
    null_byte='output_dir: "a\\0b"',
    half_a_character='output_dir: "\\ud800"',
    nested_value="evaluation: {batch_size: {a: {b: 1}}}\noutput_dir: out",
    no_class="output_dir: out\ndefence: {class_path: no_such.Class}",
    class_of_another_kind="output_dir: out\ndefence: {class_path: hf_robust_clip.PMGAFT}",
    unknown_setting_of_a_class="output_dir: out\ndefence: {class_path: TTC, init_args: {no_such: 1}}",
    function_for_a_class="output_dir: out\ndefence: os.getcwd",
)
def a_config_that_is_wrong(text: str) -> None:
    Path("own.yaml").write_text(text)
    ends(evaluate(config="own.yaml"))
    assert not Path("owned").exists() and not Path("out").exists()


@row
def aliases_nine_deep() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    Path("own.yaml").write_text("\n".join(lines))
    begun = time.perf_counter()
    ends(evaluate(config="own.yaml"), "own.yaml")
    assert time.perf_counter() - begun < 2


@row(latin="output_dir: café".encode("latin-1"), utf16="seed: 1".encode("utf-16"), bytes=bytes(range(256)))
def a_config_in_another_encoding(content: bytes) -> None:
    Path("own.yaml").write_bytes(content)
    ends(evaluate(config="own.yaml"), "own.yaml")


@row
def a_huge_config() -> None:
    Path("own.yaml").write_text("# " + "x" * 2**21)
    ends(evaluate(config="own.yaml"), "own.yaml")


@row
def a_config_that_is_a_folder() -> None:
    Path("own.yaml").mkdir()
    ends(evaluate(config="own.yaml"), "own.yaml")


# ---- settings of a training


@row(**each(
    ("gradient_accumulation_steps", "0"), ("gradient_accumulation_steps", "{a: {b: 1}}"), ("report_to", "wandb"),
    ("report_to", "[tensorboard, no_such]"), ("deepspeed", "x.json"), ("optim", "adamw_8bit"), ("optim", "no_such"),
    ("learning_rate", "{a: 1}"), ("learning_rate", ".nan"), ("warmup_steps", "-1"), ("attack_steps", "-1"),
    ("per_device_train_batch_size", "0"), ("lr_scheduler_type", "no_such"), ("seed", "-1"), ("data_seed", "1.5"),
    ("logging_steps", "[1]"), ("adam_beta1", "2"), ("eps", "9"), ("eps", "0x10"), ("label_names", "{}"),
    ("dataloader_num_workers", "-1"), ("max_grad_norm", "-1"), ("lr_scheduler_kwargs", "{no_such: 1}"),
    ("accelerator_config", "3"), ("weight_decay", "text"),
    ("log_level", "no_such"), ("neftune_noise_alpha", "1"), ("gradient_checkpointing", "[]"), ("max_steps", "1.5"),
))  # fmt: skip
def a_setting_of_a_training(pair: tuple[str, str]) -> None:
    done = train(f"--{pair[0]}", pair[1], "--output_dir", "out")
    ends(done)
    assert pair[0] in done[2] or pair[1].lower() in done[2].lower(), done[2]
    assert not Path("out").exists()


# ---- checkpoints


@row(**each(
    (("text_config", "num_hidden_layers"), 100_000), (("vision_config", "num_hidden_layers"), 100_000),
    (("vision_config", "hidden_size"), 0), (("vision_config", "hidden_size"), -16), (("projection_dim",), 0),
    (("text_config", "hidden_size"), 2**40), (("vision_config", "patch_size"), 0), (("projection_dim",), "12"),
    (("vision_config", "image_size"), -8), (("text_config", "vocab_size"), 10**12), (("text_config", "vocab_size"), 0),
    (("vision_config", "num_attention_heads"), 0), (("vision_config", "num_attention_heads"), 3),
    (("text_config", "max_position_embeddings"), 10**10), (("vision_config", "num_channels"), 10**9),
    (("vision_config",), None), (("text_config",), None), (("vision_config",), []), (("vision_config",), "clip"),
    (("vision_config",), {}), (("vision_config", "hidden_act"), "no_such"),
    (("vision_config", "num_hidden_layers"), 1),
    (("vision_config", "num_hidden_layers"), 3), (("vision_config", "image_size"), 16),
    (("vision_config", "layer_norm_eps"), "x"), (("model_type",), "bert"), (("model_type",), ["clip"]),
    (("vision_config", "intermediate_size"), 31), (("vision_config", "num_hidden_layers"), True),
    (("dtype",), "no_such"), (("dtype",), "int8"), (("quantization_config",), {"a": 1}),
    (("num_labels",), 30_000_000), (("vision_config", "num_labels"), "x"), (("text_config", "return_dict"), False),
    (("transformers_weights",), "elsewhere.safetensors.index.json"), (("vision_config", "num_hidden_layers"), 2000),
))  # fmt: skip
def a_model_whose_config_is_wrong(change: tuple[tuple[str, ...], object]) -> None:
    folder = model_in()
    edit(folder / "config.json", *change[0], value=change[1])
    begun = time.perf_counter()
    refuses_model(folder, "model")
    assert time.perf_counter() - begun < 5


@row(**each("", "[]", "3", "null", "{", '"text"', "{}", "[" * 100_000, "\ufeff{}", "\x00"))
def a_config_file_of_a_model(text: str) -> None:
    folder = model_in()
    (folder / "config.json").write_text(text)
    refuses_model(folder, "model")


@row(
    empty=lambda file: file.write_bytes(b""),
    cut_short=lambda file: file.write_bytes(file.read_bytes()[:-100]),
    header_too_long=lambda file: file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:]),
    garbage=lambda file: file.write_bytes(b"garbage" * 100),
    folder=lambda file: (file.unlink(), file.mkdir()),
    missing=lambda file: file.unlink(),
    no_weights=lambda file: save_file({}, file),
    shapes=lambda file: reshape(file, lambda w: w[..., :-1] if w.ndim > 1 else w),
    whole_numbers=lambda file: reshape(file, lambda w: w.to(torch.int32)),
    renamed=lambda file: save_file({f"x.{k}": v for k, v in load_file(file).items()}, file, {"format": "pt"}),
    pickle=lambda file: (file.unlink(), file.with_suffix(".bin").write_bytes(pickle.dumps(print))),
)
def weights(damage: Callable[[Path], object]) -> None:
    folder = model_in()
    damage(folder / "model.safetensors")
    refuses_model(folder, "model")


def reshape(file: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    save_file({name: change(w).contiguous() for name, w in load_file(file).items()}, file, {"format": "pt"})


@row(
    empty=lambda file: file.write_bytes(b""),
    cut_short=lambda file: file.write_bytes(file.read_bytes()[:-10]),
    garbage=lambda file: file.write_bytes(b"garbage" * 100),
    no_weights=lambda file: save_file({}, file),
    shapes=lambda file: reshape(file, lambda w: w[:, :-1]),
    rank=lambda file: reshape(file, lambda w: w[None]),
    whole_numbers=lambda file: reshape(file, lambda w: w.to(torch.int32)),
    renamed=lambda file: save_file({f"x.{k}": v for k, v in load_file(file).items()}, file),
    half=lambda file: save_file(dict(list(load_file(file).items())[:1]), file),
    odd=lambda file: save_file({**load_file(file), "base_model.model.more.lora_A.weight": torch.ones(1)}, file),
    pickle=lambda file: (file.unlink(), file.with_suffix(".bin").write_bytes(pickle.dumps(print))),
)
def weights_of_an_adapter(damage: Callable[[Path], object]) -> None:
    folder = adapter_in()
    damage(folder / "adapter_model.safetensors")
    refuses_model(folder, "adapter")


@row(**each(
    ("base_model_name_or_path", "adapter"), ("base_model_name_or_path", ""), ("base_model_name_or_path", None),
    ("base_model_name_or_path", ["model"]), ("base_model_name_or_path", "nowhere"), ("revision", 3), ("r", 3),
    ("base_model_name_or_path", "../../../etc"), ("base_model_name_or_path", "model\x00"), ("peft_type", "NO_SUCH"),
    ("peft_type", None), ("peft_type", 3), ("r", 0), ("r", "two"), ("target_modules", None), ("target_modules", "["),
    ("target_modules", ["nothing"]), ("target_modules", 5), ("auto_mapping", {"parent_library": "os", "base": "x"}),
    ("base_model_name_or_path", "circle"), ("task_type", "NO_SUCH"), ("layers_to_transform", [99]),
    ("modules_to_save", ["nothing"]), ("rank_pattern", 3), ("bias", "no_such"), ("lora_alpha", "x"),
))  # fmt: skip
def an_adapter_whose_settings_are_wrong(change: tuple[str, object]) -> None:
    folder = adapter_in()
    adapter_in("circle")
    edit(Path("circle/adapter_config.json"), "base_model_name_or_path", value="adapter")
    edit(folder / "adapter_config.json", change[0], value=change[1])
    if change[0] in ("auto_mapping", "task_type", "modules_to_save"):  # the weights are all there
        with contextlib.suppress(*ERRORS):
            assert load(folder)(torch.zeros(1, 3, 8, 8))
        return
    refuses_model(folder)


@row(**each("", "[]", "3", "null", "{", "{}", '"text"', "[" * 100_000))
def an_adapter_file_of_settings(text: str) -> None:
    folder = adapter_in()
    (folder / "adapter_config.json").write_text(text)
    refuses_model(folder, "adapter")


@row(**each(
    ("crop_size", None), ("crop_size", {}), ("crop_size", {"height": 8}), ("crop_size", {"height": 8, "width": 9}),
    ("crop_size", 0), ("crop_size", -8), ("crop_size", "8"), ("crop_size", {"height": 8.5, "width": 8.5}),
    ("crop_size", 100_000), ("size", {"shortest_edge": 100_000}), ("size", None), ("size", 0), ("size", "x"),
    ("image_mean", [0.5]), ("image_mean", None), ("image_mean", ["a", "b", "c"]), ("image_std", [0, 0, 0]),
    ("image_std", [-1, 1, 1]), ("image_std", [float("nan")] * 3), ("rescale_factor", 0), ("rescale_factor", 1),
    ("resample", 99), ("image_processor_type", "NoSuch"), ("image_processor_type", 3),
))  # fmt: skip
def a_processor(change: tuple[str, object]) -> None:
    """Refused where it is loaded, or where pictures are to be read."""
    folder = model_in()
    edit(folder / "processor_config.json", "image_processor", change[0], value=change[1])
    picture("set/test/a/1.png"), picture("set/test/b/1.png")
    refused(lambda: load_image_dataset("set", "test", load(folder).require_processor())[0])
    ends(evaluate("--model_name_or_path", "model", "--dataset_name", "set", "--output_dir", "out"))


@row
def a_processor_without_sizes() -> None:
    """It has those of CLIP, as transformers reads it."""
    folder = model_in()
    content = json.loads((folder / "processor_config.json").read_text())
    for name in ("crop_size", "size"):
        content["image_processor"].pop(name)
    (folder / "processor_config.json").write_text(json.dumps(content))
    picture("set/test/a/1.png")
    picture("set/test/b/1.png")
    assert load_image_dataset("set", "test", load(folder).require_processor()).resolution == 224


@row(**each("", "[]", "{", "null", "{}"))
def a_processor_file(text: str) -> None:
    folder = model_in()
    (folder / "processor_config.json").write_text(text)
    refuses_model(folder, "model")


@row(
    no_vocabulary=lambda folder: [(folder / n).unlink(missing_ok=True) for n in ("tokenizer.json", "vocab.json")],
    empty=lambda folder: (folder / "tokenizer.json").write_text(""),
    nested=lambda folder: (folder / "tokenizer.json").write_text("[" * 100_000),
    other_vocabulary=lambda folder: CLIPTokenizer(
        vocab={"a</w>": 0, "<|startoftext|>": 1, "<|endoftext|>": 2}, merges=[]
    ).save_pretrained(folder),
    larger_vocabulary=lambda folder: CLIPTokenizer(
        vocab={f"{chr(97 + i % 26)}{i // 26 or ''}</w>": i + 2 for i in range(26 * 40)}
        | {"<|startoftext|>": 0, "<|endoftext|>": 1},
        merges=[],
    ).save_pretrained(folder),
)
def a_tokenizer(damage: Callable[[Path], object]) -> None:
    folder = model_in()
    damage(folder)
    refused(lambda: load(folder).set_classes(CLASS_NAMES))


@row(**each(
    ("name", None), ("format", 99), ("method", "no_such"), ("method", 3), ("parameters", None), ("parameters", [1]),
    ("base_model", "adapter"), ("base_model", 3), ("class_names", "text"), ("class_names", [1]), ("seed", "x"),
    ("templates", []), ("input_size", -1), ("input_size", "x"), ("parameters", {"no_such": 1}),
))  # fmt: skip
def a_saved_defence(change: tuple[str, object]) -> None:
    model = load(model_in())
    model.set_classes(CLASS_NAMES)
    DefendedClassifier(model, TTC()).save_pretrained("adapter")
    if change[0] == "name":
        Path("adapter/adaptation.json").write_text("{" * 100_000)
    else:
        edit(Path("adapter/adaptation.json"), change[0], value=change[1])
    refused(lambda: DefendedClassifier.from_pretrained("adapter"))


@row(**each("no such", "-x", "a/b/c", "..", "\x00", "a" * 300, "http://localhost:1/x", "hf://x", "~root", "", "a\nb"))
def the_name_of_a_model(name: str) -> None:
    refused(lambda: load(name))
    ends(evaluate("--model_name_or_path", name, "--output_dir", "out"))


# ---- code, and files elsewhere


@contextlib.contextmanager
def nothing_opened() -> Iterator[None]:
    """No connection is tried, and nobody is asked."""

    def forbidden(*arguments: object) -> None:
        raise AssertionError(f"asked or called: {arguments}")

    connect = socket.socket.connect
    socket.socket.connect = forbidden  # type: ignore[assignment, method-assign]
    asked, sys.stdin = sys.stdin, io.StringIO("y\n" * 9)
    try:
        yield
    finally:
        socket.socket.connect = connect  # type: ignore[method-assign]
        sys.stdin = asked


@row(**each("processor_config.json", "tokenizer_config.json", "config.json"))
def code_beside_a_model(name: str) -> None:
    folder = model_in()
    (folder / "evil.py").write_text(f"open({str(Path('owned').absolute())!r}, 'w')\nclass Evil: pass\n")
    kinds = ("AutoConfig", "AutoModel", "AutoProcessor", "AutoImageProcessor", "AutoTokenizer")
    edit(folder / name, "auto_map", value=dict.fromkeys(kinds, "evil.Evil"))
    with nothing_opened(), contextlib.suppress(*ERRORS):
        load(folder)
    assert not Path("owned").exists()


@row(**each(("attn_implementation", "org/kernel"), ("_attn_implementation", "org/kernel@main:x")))
def a_kernel_from_the_hub(change: tuple[str, str]) -> None:
    folder = model_in()
    edit(folder / "config.json", change[0], value=change[1])
    with nothing_opened():
        assert load(folder).config._attn_implementation == "sdpa"


@row(**each("../other/b.safetensors", "/etc/passwd", "model.bin", 3))
def an_index_of_weights_that_names_other_files(name: object) -> None:
    folder = model_in()
    keys = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename("elsewhere")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(keys, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refuses_model(folder, "index")


@row(**each("", "[]", "{", "null", '{"weight_map": 3}', '{"weight_map": [1]}', "[" * 100_000))
def an_index_of_weights(text: str) -> None:
    folder = model_in()
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(text)
    refuses_model(folder, "index")


class Bomb:
    """A pickle that leaves a file where it is opened."""

    def __reduce__(self) -> tuple:
        return open, (str(Path("owned").absolute()), "w")


@row(**each("pytorch_model.bin", "adapter_model.bin", "model.pt", "training_args.bin"))
def a_pickle(name: str) -> None:
    folder = adapter_in() if "adapter" in name else model_in()
    for file in folder.glob("*.safetensors"):
        file.unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb()))
    refuses_model(folder)
    assert not Path("owned").exists()


@row(**each("/etc/passwd", "https://localhost:1/x.png", "../../x.png", "zip://a.png::/etc/x.zip"))
def a_row_that_names_a_file_elsewhere(path: str) -> None:
    import pyarrow as arrow
    from pyarrow.parquet import write_table

    Path("set").mkdir()
    rows = arrow.table({"image": [{"bytes": None, "path": path}] * 2, "label": ["a", "b"]})
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    kept = {"info": {"features": {"image": {"_type": "Image"}, "label": {"dtype": "string", "_type": "Value"}}}}
    assert features
    write_table(rows.replace_schema_metadata({"huggingface": json.dumps(kept)}), "set/test-00000-of-00001.parquet")
    with nothing_opened():
        refused(lambda: data("set", label_column="label")[0])


# ---- names and cards


@row(**each("model", "prompts", "defence", "unmeasured", "unmeasured defence"))
def a_card_of_crafted_names(kind: str) -> None:
    """Headings, tables, HTML and links are those of a card of plain names."""
    crafted, plain = (outline(cards(text)[kind]) for text in (HOSTILE, BENIGN))
    assert {**crafted, "metadata": None} == {**plain, "metadata": None}
    assert len(python_blocks(cards(HOSTILE)[kind])) == len(python_blocks(cards(BENIGN)[kind]))


@row(
    **each(
        "", "[]", "{", "null", '{"format": 1}', "[" * 100_000, '{"format": 3, "reports": 1, "compared": 2}', "\ud800"
    )
)
def a_card_of_a_damaged_report(text: str) -> None:
    Path("mine").mkdir()
    Path("mine/report.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    Path("mine/README.md").write_text("my own words")
    ends(command("card", "mine"))
    assert Path("mine/README.md").read_text() == "my own words"


@row(
    **each(
        "$x^{_a$", "$\\frac$", "a\tb$", "<b>x</b>", "[red]x[/red]", ":smile:", "%s {0}", "\\u0041", "日本", "a" * 300
    )
)
def a_task_of_a_strange_name(name: str) -> None:
    tasks = json.dumps([{"name": name, "dataset": "digits", "split": "test", "max_images": 2}])
    small = ("--evaluation.attacks", "pgd-1", "--evaluation.radii", "[1/255]", "--use_cpu", "--output_dir", "mine")
    status, out, error = command("evaluate", "--config", str(EVALUATION), "--tasks", tasks, *small)
    if "\t" in name:
        ends((status, out, error), "name")
        return
    assert status == 0, error
    assert load_reports("mine/report.json")[0][0].task == name
    assert Path("mine/accuracy.png").is_file() and "WARNING" not in out


@row(**each("", " ", "a\nb", "a\x1b[31mb", "\u2028", "\x00"))
def a_task_of_a_name_that_is_refused(name: str) -> None:
    tasks = json.dumps([{"name": name, "dataset": "digits"}])
    if name:
        ends(command("evaluate", "--config", str(EVALUATION), "--tasks", tasks, "--output_dir", "out"), "name")


@row
def a_model_in_the_current_folder() -> None:
    load("digits-clip").save_pretrained(".")
    assert evaluate("--model_name_or_path", ".", "--output_dir", "mine")[0] == 0
    assert load_reports("mine/report.json")[0][0].name


# ---- folders and tables of pictures


@row
def a_picture_beside_the_class_folders() -> None:
    for name in ("a/1.png", "b/1.png", "stray.png"):
        picture(Path("set/test", name))
    refused(lambda: data("set"), "stray.png")


@row
def nested_class_folders() -> None:
    for name in ("a/1.png", "b/1.png", "b/deep/2.png"):
        picture(Path("set/test", name))
    refused(lambda: data("set"), "deep")


@row
def class_folders_two_deep() -> None:
    for name in ("animals/cat/1.png", "animals/dog/1.png", "things/cup/1.png"):
        picture(Path("set/test", name))
    refused(lambda: data("set"), "test/animals/cat", "test/things/cup")
    Path("set/test/things/cup").rename("set/test/animals/cup")
    Path("set/test/things").rmdir()
    assert sorted(data("set/test/animals", "train").class_names) == ["cat", "cup", "dog"]


@row
def one_class_alone() -> None:
    picture("set/test/a/1.png")
    refused(lambda: data("set"), "a")


@row(
    empty=lambda file: file.write_bytes(b""),
    cut_short=lambda file: file.write_bytes(file.read_bytes()[:-20]),
    first_half=lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    garbage=lambda file: file.write_bytes(b"garbage"),
    folder=lambda file: (file.unlink(), file.mkdir()),
    page=lambda file: file.write_text("<!doctype html><html>404</html>"),
    pointer=lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"),
)
def a_parquet_file(damage: Callable[[Path], object]) -> None:
    damage(parquet("set/test-00000-of-00001.parquet"))
    refused(lambda: data("set")[0], "set")


@row
def a_second_parquet_file_cut_short() -> None:
    parquet("set/test-00000-of-00002.parquet")
    second = parquet("set/test-00001-of-00002.parquet")
    second.write_bytes(second.read_bytes()[:-30])
    refused(lambda: data("set"), "test-00001-of-00002.parquet")


@row(
    empty=lambda file: file.write_bytes(b""),
    cut_short=lambda file: file.write_bytes(file.read_bytes()[:60]),
    text=lambda file: file.write_text("no picture"),
    link_to_nothing=lambda file: (file.unlink(), file.symlink_to("nowhere.png")),
)
def a_picture_file(damage: Callable[[Path], object]) -> None:
    picture("set/test/b/1.png"), picture("set/test/a/2.png")
    damage(picture("set/test/a/1.png", (64, 64)))
    refused(lambda: [data("set")[i] for i in range(3)], "1.png")


@row(**each("---\na: [\n---\n", "---\nconfigs: 3\n---\n", "---\ndataset_info: [3]\n---\n",
            "---\nconfigs: [[a]]\n---\n", "---\ndataset_info: {splits: [{name: 3}]}\n---\n"))  # fmt: skip
def the_card_of_a_dataset(text: str) -> None:
    """Either its rows, or an error that names README.md."""
    parquet("set/test-00000-of-00001.parquet")
    Path("set/README.md").write_text(text)
    try:
        assert len(data("set")) == 2
    except ERRORS as error:
        check_line(str(error), "README.md")


@row(**each("\ud800", "a\nb", "", "  ", "x" * 10_000, 3, None))
def a_class_name(name: object) -> None:
    model = load(model_in())
    refused(lambda: model.set_classes(["one", name]), "tokens" if name == "x" * 10_000 else "class_names[1]")


# ---- files that are written


@row(**each("state/thesis.txt", "checkpoint-of-my-life/a.txt", "checkpoint-1/notes.txt", "state/x/state-0.jsonl.bak"))
def files_of_somebody_else(name: str) -> None:
    Path("mine", name).parent.mkdir(parents=True)
    Path("mine", name).write_text("mine")
    status, _, error = evaluate("--output_dir", "mine", "--overwrite")
    assert status == 0, error
    assert Path("mine", name).read_text() == "mine"


@row(**each("state", "report.json", "accuracy.png", "recipe.yaml", "report.csv", "examples.png"))
def a_link_in_the_output_folder(name: str) -> None:
    Path("mine").mkdir()
    Path("elsewhere").mkdir()
    target = Path("elsewhere") if name == "state" else Path("elsewhere/file")
    (Path("elsewhere") / "state-0.jsonl").write_text("mine")
    if name != "state":
        target.write_text("mine")
    Path("mine", name).symlink_to(target.absolute())
    status, _, error = evaluate("--output_dir", "mine", "--overwrite")
    assert status == 0 or name == "state", error
    assert (Path("elsewhere") / "state-0.jsonl").read_text() == "mine"
    assert name == "state" or target.read_text() == "mine"


@row(
    garbage=lambda lines: [*lines[:-1], b"garbage\n"],
    blank=lambda lines: [lines[0], b"\n", *lines[1:]],
    bytes=lambda lines: [lines[0], b"\xff\xfe\n", *lines[1:]],
    of_another=lambda lines: [lines[0].replace(b"a", b"b"), *lines[1:]],
    cut_short=lambda lines: [*lines[:-1], lines[-1][:-9]],
    empty=lambda lines: [],
)
def the_state_of_an_evaluation(damage: Callable[[list[bytes]], list[bytes]]) -> None:
    """Either the same figures, or one line."""
    assert evaluate("--output_dir", "mine")[0] == 0
    figures = Path("mine/report.json").read_text()
    (state,) = Path("mine").glob("state/*/state-0.jsonl")
    state.write_bytes(b"".join(damage(state.read_bytes().splitlines(keepends=True))))
    Path("mine/report.json").unlink()
    done = evaluate("--output_dir", "mine", "--resume")
    if done[0]:
        ends(done)
    else:
        assert Path("mine/report.json").read_text() == figures


@row(**each("a_file", "a_file/inside", "/proc/nowhere", "/dev/null/x", "x" * 300, "a\x00b", "link_to_nothing"))
def an_output_folder_that_can_not_be_written(name: str) -> None:
    Path("a_file").touch()
    Path("link_to_nothing").symlink_to("/proc/nowhere")
    for run in (evaluate, train):
        ends(run("--output_dir", name))


def run(rows: Mapping[str, Callable[[], object]]) -> dict[str, str]:
    """Run rows, each in an empty folder of its own. Returns, by row, what went wrong."""
    failed: dict[str, str] = {}
    here = os.getcwd()
    datasets.disable_progress_bars()
    logging.disable(logging.CRITICAL)
    try:
        for name, check in rows.items():
            AcceleratorState._reset_state(reset_partial_state=True)
            os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
            with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                os.chdir(folder)
                begun = time.perf_counter()
                try:
                    check()
                except BaseException:  # whatever comes through is what is looked for
                    failed[name] = traceback.format_exc()
                finally:
                    os.chdir(here)
                    SECONDS[name] = time.perf_counter() - begun
    finally:
        logging.disable(logging.NOTSET)
    return failed


def main() -> None:
    words = [word for word in sys.argv[1:] if word != "-v"]
    chosen = {name: check for name, check in ROWS.items() if all(word in name for word in words)}
    begun = time.perf_counter()
    failed = run(chosen)
    if "-v" in sys.argv:
        for name, seconds in sorted(SECONDS.items(), key=lambda item: -item[1])[:40]:
            print(f"{seconds:6.2f} {name}")
    for name, report in failed.items():
        print(f"did not hold: {name}\n    {report.strip().splitlines()[-1][:300]}")
    print(f"tried {len(chosen)}, held {len(chosen) - len(failed)}, in {time.perf_counter() - begun:.0f} s")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
