"""What of a folder is uploaded to the Hub, and what must be right before and after."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Literal

import yaml

from .checkpoint_notes import CHECKPOINT
from .names import cached_revision, hub_name, paths_in, without_paths
from .report.card import LIBRARY, name_repository
from .report.converted import PROVENANCE, name_converted
from .report.eval_results import EVAL_RESULTS
from .secrets import holds_token, without_token_keys, without_tokens
from .storage import delete, read_json, written_whole
from .typed_settings import OneMeaning, parse_yaml, read_text

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

Kind = Literal["model", "adapter", "defence"]
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.distcp", "*.joblib")  # they run code when read
LEFTOVERS = ("checkpoint-*", "last-checkpoint/*", "state/*", "compared/*", "tuning/*", "runs/*", "wandb/*", "mlruns/*",
             "*.part", "*.log", "events.out.tfevents.*", "trainer_state.json", ".*", "*/.*", "_*")  # fmt: skip
NEVER_PUSHED = (*PICKLES, *LEFTOVERS)
MODEL_FILES = ("model.safetensors", "model-*-of-*.safetensors", "adapter_model.safetensors",
               "model.safetensors.index.json", "config.json", "generation_config.json",
               "adapter_config.json", "adaptation.json", "processor_config.json", "preprocessor_config.json",
               "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
               "added_tokens.json", "chat_template.jinja", "descriptions.json")  # fmt: skip
# what belongs to the weights beside them
FIGURES = ("report.json", "report.csv", "recipe.yaml", "accuracy.png", "examples.png", "widget.png", "tuning.csv",
           "tuning.png", PROVENANCE)  # fmt: skip
TRAINERS = ("training_args.bin", "pytorch_model*.bin", "adapter_model.bin", "optimizer.*", "scheduler.pt", "scaler.pt",
            "rng_state*.pth")  # fmt: skip
RESUMED = ("trainer_state.json", "training_run.json", "weight_average.safetensors", "*.distcp", ".metadata")
FITTED = re.compile(r"[\w-]+\.safetensors")  # what a defence learned, beside its settings
STATE = re.compile(
    r"[^/]+-[0-9a-f]{8}/(state-\d+\.jsonl|stream-[0-9a-f]{16}\.safetensors|pictures-(\d+\.part|[0-9a-f]{16}\.arrow))|(statistics|fit/[^/]+-[0-9a-f]{8})/[^/]+/state-\d+\.safetensors"
)
SEARCH = "tuning"  # folder of a hyperparameter search
JOURNAL = ("journal.log", "journal.log.lock")
WHOLE_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
ADAPTER_WEIGHTS = ("adapter_model.*",)
TEXTS = (".json", ".yaml", ".yml", ".md", ".txt", ".csv")
LARGEST_TEXT = 20_000_000  # bytes


@dataclass(frozen=True)
class Push:
    """Where something is uploaded to.

    Args:
        repo_id: `owner/name`, or a name alone for one's own.
        token: None takes that of HF_TOKEN or `hf auth login`.
        private: of a repository that is made; None takes the Hub's default.
        revision: a branch; None takes `main`.
    """

    repo_id: str
    token: str | bool | None = field(default=None, repr=False)
    private: bool | None = None
    revision: str | None = None


def check_push(push: Push, name: str = "push_to_hub") -> None:
    """Raise ValueError for a repository that can't be, OSError where nothing can be uploaded: offline, or no token."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(push.repo_id)
    except ValueError as error:
        raise ValueError(f"{name}={push.repo_id!r} is no repository of the Hub; write owner/name.") from error
    if constants.HF_HUB_OFFLINE:
        raise OSError(f"{name}={push.repo_id!r}: the Hub is switched off (HF_HUB_OFFLINE=1); unset it, or don't push.")
    if not (push.token if isinstance(push.token, str) else get_token()):
        raise OSError(f"{name}={push.repo_id!r}: there is no token; set HF_TOKEN or run `hf auth login`.")


def prepare_repository(push: Push, kind: Kind, name: str = "push_to_hub") -> Push:
    """Make the repository, unless it is there, and see that it can be written to; its whole id comes back.

    Args:
        kind: of what will be pushed.

    Raises as `check_push`, OSError if the Hub refuses, and ValueError for a repository that holds weights of another
    kind: whole ones beside an adapter would be loaded in its place, or the other way round.
    """
    from huggingface_hub import HfApi

    check_push(push, name)
    api = HfApi(token=push.token)
    try:
        repo_id = api.create_repo(push.repo_id, private=push.private, exist_ok=True).repo_id
        api.auth_check(repo_id, write=True)
        if push.revision is not None and not push.revision.startswith("refs/"):
            api.create_branch(repo_id, branch=push.revision, exist_ok=True)
        there = api.list_repo_files(repo_id, revision=push.revision)
    except Exception as error:  # the Hub's client raises many kinds
        raise OSError(f"{name}={push.repo_id!r} can't be written to: {reason_of(error)}") from error
    others = [file for file in there if _fits(file, ADAPTER_WEIGHTS if kind == "model" else WHOLE_WEIGHTS)]
    if others:
        raise ValueError(f"{name}={repo_id!r} holds {others[0]}, which goes with no {kind}; delete it there.")
    return replace(push, repo_id=repo_id)


def reason_of(error: BaseException) -> str:
    """An error of the Hub's client in one line, without tokens."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and "information check" not in line]
    return without_tokens(" ".join(lines[:2]) or type(error).__name__)


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload robust CLIP",
) -> str:
    """Upload a finished folder, pickles and checkpoints left out; returns its address.

    Its card is made again where it names another repository. Raises as `check_folder`, `prepare_repository`, `upload`.
    """
    push = Push(repo_id, token, private, revision)
    check_push(push, "repo_id")
    kind = check_folder(folder)
    with saved_in(folder, push):
        push = prepare_repository(push, kind, "repo_id")
        name_repository(folder, push.repo_id)
        name_converted(folder, push.repo_id)
        check_card(folder, push.repo_id)
        return without_tokens(str(upload(folder, push, commit_message).repo_url))


def check_card(folder: str | Path, repo_id: str) -> None:
    """Raise ValueError if a card of this package shows how to load another repository than the one it goes to."""
    text = Path(folder, "README.md").read_text(encoding="utf-8")
    if LIBRARY in text and "from_pretrained(" in text and f'"{repo_id}"' not in text:
        raise ValueError(f"README.md in folder={str(folder)!r} loads another repository than {repo_id!r}.")


def files_to_push(folder: str | Path, only: Sequence[str] = ("*",)) -> list[str]:
    """The files of a folder that are uploaded, relative to it."""
    own = (path.relative_to(folder).as_posix() for path in sorted(Path(folder).rglob("*")) if path.is_file())
    return [name for name in own if _fits(name, only) and (name == EVAL_RESULTS or not _fits(name, NEVER_PUSHED))]


def check_folder(folder: str | Path, only: Sequence[str] = ("*",)) -> Kind:
    """What a folder holds.

    Raises ValueError unless others can load it (weights, processor, a base that they have), it has a card, and no text
    in it tells an access token or a path of this disk.
    """
    files = files_to_push(folder, only)
    kind = kind_of(files)
    if kind is None:
        raise ValueError(
            f"folder={str(folder)!r} is no whole model with config, weights and processor, nor an adapter."
        )
    if "README.md" not in files:
        raise ValueError(f"folder={str(folder)!r} has no README.md; write one with make_card or create_model_card.")
    for file, key in (("adapter_config.json", "base_model_name_or_path"), ("adaptation.json", "base_model")):
        if file in files:
            check_base(read_json(Path(folder, file)).get(key), file)
    for file in files:
        text = _text_to_check(folder, file)
        if holds_token(text):
            raise ValueError(f"{file} in folder={str(folder)!r} holds an access token or a password; take it out.")
        places = paths_in(text)
        if places:
            raise ValueError(f"{file} in folder={str(folder)!r} tells a path, {places[0]!r}; take it out.")
    return kind


def check_base(name: Any, what: str) -> str:
    """The Hub's name of a base model. Raises ValueError for one that others can't load."""
    found = hub_name(name) if isinstance(name, str) else None
    if found is None:
        raise ValueError(f"{what} names the base model {name!r}, which others don't have: push that first.")
    return found


def kind_of(files: Sequence[str]) -> Kind | None:
    """What files make together; None if something is missing."""
    own = set(files)
    if "adaptation.json" in own:
        return "defence"
    if "adapter_config.json" in own:
        return "adapter" if "adapter_model.safetensors" in own else None
    weights = own & {"model.safetensors", "model.safetensors.index.json"}
    processor = own & {"processor_config.json", "preprocessor_config.json"}
    tokenizer = own & {"tokenizer.json", "vocab.json"}
    return "model" if "config.json" in own and weights and processor and tokenizer else None


def published(folder: str | Path, file: str) -> bytes | Path:
    """What is uploaded of a file: a recipe without paths and tokens, the base model of an adapter by its Hub's name;
    all others as they are.
    """
    path = Path(folder, file)
    if file == "recipe.yaml":
        recipe = without_paths(without_token_keys(parse_yaml(read_text(path), file, OneMeaning)))
        return dump_recipe(recipe).encode()
    keys = {"adapter_config.json": ("base_model_name_or_path", "revision"),
            "adaptation.json": ("base_model", "base_revision")}.get(file)  # fmt: skip
    if keys is None:
        return path
    text = path.read_text(encoding="utf-8")
    content = json.loads(text)
    base, revision = keys
    name = check_base(content.get(base), file)
    if name == content[base]:
        return path
    content |= {base: name, revision: cached_revision(content[base]) or content.get(revision)}
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def dump_recipe(settings: Any) -> str:
    """Settings as recipe.yaml has them."""
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


def upload(folder: str | Path, push: Push, commit_message: str, only: Sequence[str] = ("*",)) -> CommitInfo:
    """Upload a folder to a repository that is there.

    What the repository holds of the weights that were there before, figures and pickles among it, is deleted.

    Args:
        only: patterns of the files; nothing of `NEVER_PUSHED` goes along.

    Raises OSError if it fails.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=push.token)
    files = files_to_push(folder, only)
    try:
        operations: list[Any] = [CommitOperationAdd(file, _source(folder, file)) for file in files]
        remote = api.list_repo_files(push.repo_id, revision=push.revision)
        fitted: tuple[str, ...] = ()
        if "adaptation.json" in remote:
            there = api.hf_hub_download(push.repo_id, "adaptation.json", revision=push.revision)
            fitted = fitted_files(Path(there).parent)
        stale = [file for file in remote if is_stale(file) or file in fitted]
        operations += [CommitOperationDelete(file) for file in stale if file not in files]
        return api.create_commit(push.repo_id, operations, commit_message=commit_message, revision=push.revision)
    except Exception as error:  # the Hub's client raises many kinds
        raise OSError(f"the upload to {push.repo_id!r} failed: {reason_of(error)}") from error


@contextmanager
def saved_in(folder: str | Path, push: Push) -> Iterator[None]:
    """Let an OSError say that nothing is lost: where everything is, and what uploads it."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{str(error).rstrip('. ')}. Everything is saved in {str(folder)!r}; upload it: "
            f"{upload_command(folder, push)}"
        ) from error


def upload_command(folder: str | Path, push: Push) -> str:
    """What uploads the same files by hand."""
    excluded = [word for pattern in NEVER_PUSHED for word in ("--exclude", pattern)]
    more = [*(["--revision", push.revision] if push.revision else []), *(["--private"] if push.private else [])]
    command = shlex.join(["hf", "upload", push.repo_id, str(folder), ".", *more, *excluded])
    if not Path(folder, EVAL_RESULTS).is_file():
        return command
    single = ["hf", "upload", push.repo_id, str(Path(folder, EVAL_RESULTS)), EVAL_RESULTS, *more]  # `.*` is excluded
    return f"{command} && {shlex.join(single)}"


def is_stale(file: str) -> bool:
    """Whether a file of a repository belongs to the weights that were there before."""
    left = ("checkpoint-*/*", "last-checkpoint/*", "state/*", EVAL_RESULTS)
    return _fits(file, left) or ("/" not in file and _fits(file, (*MODEL_FILES, *FIGURES, *TRAINERS)))


def fitted_files(folder: str | Path) -> tuple[str, ...]:
    """The files of a folder in which a defence keeps what it learned, as its adaptation.json lists them; none where
    that can't be read.
    """
    try:
        listed = read_json(Path(folder, "adaptation.json"))["fitted"].values()
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return ()
    return tuple(file for file in listed if isinstance(file, str) and FITTED.fullmatch(file))


def copy_model(source: str | Path, target: str | Path) -> None:
    """Copy what makes a model from a Trainer's checkpoint, without what it is resumed from."""
    with written_whole(target) as draft:
        for path in sorted(Path(source).iterdir()):
            if path.is_file() and _fits(path.name, (*MODEL_FILES, *fitted_files(source))):
                shutil.copy(path, draft)


def clear_model(folder: str | Path) -> None:
    """Delete what an earlier run left of a model, so that no half of it is taken for this one's."""
    ours = (*MODEL_FILES, *fitted_files(folder), *FIGURES, "README.md")
    Path(folder, EVAL_RESULTS).unlink(missing_ok=True)
    for path in Path(folder).glob("*"):
        if path.is_file() and _fits(path.name, ours):
            path.unlink(missing_ok=True)  # another machine may clear the same folder


def clear_checkpoints(folder: str | Path) -> None:
    """Delete what a Trainer saves of a training, by its files' names: whatever else lies there stays."""
    for pattern in ("checkpoint-*", "state/statistics/*/checkpoint-*"):
        for place in Path(folder).resolve().glob(pattern):
            clear_checkpoint(place)


def clear_checkpoint(place: Path) -> None:
    """Delete what a Trainer saves, of one folder `checkpoint-<step>`."""
    if CHECKPOINT.fullmatch(place.name):
        ours = (*MODEL_FILES, *fitted_files(place), *TRAINERS, *RESUMED)
        delete(place, lambda name: _fits(PurePath(name).name, ours))


def clear_states(folder: str | Path) -> None:
    """Delete the states of evaluations and of what is fitted, by their files' names."""
    delete(Path(folder).resolve() / "state", STATE.fullmatch)


def clear_search(folder: str | Path) -> None:
    """Delete the trials of a hyperparameter search, by their files' names."""
    delete(Path(folder).resolve() / SEARCH, lambda name: name in JOURNAL)


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _source(folder: str | Path, file: str) -> bytes | str:
    found = published(folder, file)
    return found if isinstance(found, bytes) else str(found)


def _text_to_check(folder: str | Path, file: str) -> str:
    """What a file tells others in words: a text as it is uploaded, the metadata of weights; empty for all others."""
    path = Path(folder, file)
    if path.suffix == ".safetensors":
        with path.open("rb") as weights:
            size = int.from_bytes(weights.read(8), "little")
            header = json.loads(weights.read(size))
        return json.dumps(header.get("__metadata__", {}))
    if path.suffix not in TEXTS or path.stat().st_size > LARGEST_TEXT or path.name in ("tokenizer.json", "vocab.json"):
        return ""
    found = published(folder, file)
    return found.decode() if isinstance(found, bytes) else path.read_text(encoding="utf-8", errors="replace")
