"""From the words of a command line and a YAML file to settings, by jsonargparse; no model is loaded here.

What jsonargparse leaves to us: texts that stay as they were typed (`typed_settings`), one value for each flag,
switches without a value, names of classes without their module, presets of classes, and one line for each error.
"""

from __future__ import annotations

import difflib
import inspect
import os
import pkgutil
import re
import sys
import textwrap
from argparse import SUPPRESS, ArgumentError, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace, set_loader, set_parsing_settings

from .secrets import SHOWN, is_token_key, refuse_tokens, without_token_keys, without_tokens
from .storage import check_text
from .typed_settings import check_numbers, parse_yaml, plain_value, read_text, typed_text

LONGEST_ERROR = 600
RECIPES = "recipes"  # beside this file in a wheel, beside the package in a checkout


class HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """jsonargparse's, which leaves the lines of a description as they are, and calls classes by their names."""

    def format_help(self) -> str:
        """Its own."""
        return re.sub(r"<class\s+'(\w+)'>", r"\1", super().format_help())


@dataclass(frozen=True)
class ClassFlag:
    """A flag whose value is a class, with its settings as nested flags.

    Args:
        base: what the class must be of.
        packages: where classes are found by their names alone.
        names: whether a text that names no class has a meaning of its own.
        several: whether the value is a list of such.
    """

    base: type
    packages: tuple[str, ...]
    names: bool = False
    several: bool = False


@dataclass(frozen=True)
class CommandLine:
    """Which flags a command has.

    Args:
        groups: dataclasses by the prefix of their flags; "" for flags without one.
        classes: flags whose values are classes, by name.
        required: flags that a run can't do without.
        skip: fields that have no flags, with their prefix.
    """

    groups: Mapping[str, Sequence[type]]
    classes: Mapping[str, ClassFlag]
    required: Sequence[str]
    skip: frozenset[str] = frozenset()

    def fields_of(self, cls: type, prefix: str = "") -> list[str]:
        """The fields of a dataclass that have flags."""
        return [f.name for f in fields(cls) if f.init and _dotted(prefix, f.name) not in self.skip]

    @cached_property
    def hints(self) -> dict[str, Any]:
        """The types of all flags, by name."""
        return {action.dest: getattr(action, "_typehint", action.type) for action in self.parser._actions}

    @cached_property
    def parser(self) -> ArgumentParser:
        """The parser, with a help text for each flag."""
        set_loader("texts", typed_text, exceptions=(yaml.YAMLError, ValueError))
        set_parsing_settings(subclasses_enabled=[flag.base for flag in self.classes.values()])
        parser = ArgumentParser(
            usage="%(prog)s [--config FILE] [--NAME VALUE ...]", formatter_class=HelpFormatter, exit_on_error=False,
            parser_mode="texts", allow_abbrev=False,
        )  # fmt: skip
        parser.add_argument("--config", help="YAML file of these flags in place of the default one")
        parser.add_argument("--print_config", type=bool, default=False, help="print all settings as YAML and end")
        helps = {prefix: f"all of {prefix}.NAME at once, as {{NAME: VALUE, ...}}" for prefix in self.groups}
        helps |= {f"{flag}.help": "list the settings of such a class, and end" for flag in self.classes}
        for prefix, settings_classes in self.groups.items():
            for cls in settings_classes:
                names = self.fields_of(cls, prefix)
                parser.add_class_arguments(
                    cls, prefix or None, skip={f.name for f in fields(cls) if f.name not in names}, fail_untyped=False
                )
                helps |= {_dotted(prefix, name): text for name, text in helps_of(cls).items()}
                parser._action_groups[-1].title = said_of(cls)
        for action in parser._actions:
            hidden = action.dest.endswith(".help") and action.dest not in helps
            action.help = SUPPRESS if hidden else helps.get(action.dest, action.help)
            action.required = False  # what is missing is named at once, in the end
        return parser


@dataclass(frozen=True)
class Given:
    """What was asked for.

    Args:
        settings: as plain values, without defaults: for recipe.yaml, and for what asks whether somebody said it.
        values: the same as a parser's namespace, to be made into settings.
        presets: names of presets, by flag.
    """

    settings: dict[str, Any]
    values: Namespace
    presets: Mapping[str, str]
    parser: ArgumentParser
    command: CommandLine

    def asked(self, flag: str) -> Any:
        """What was given for a flag; None if nothing was."""
        found: Any = self.settings
        for part in flag.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        return found

    def made(self) -> Namespace:
        """Settings with their classes made. A preset gives what nobody asked for."""
        values = filled(self.values, self.command, self.presets)
        try:
            return self.parser.instantiate(values)
        except Exception as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            if isinstance(cause, ValueError | TypeError | OSError):
                raise cause from None
            raise

    def group(self, cls: type, made: Namespace) -> Any:
        """A settings dataclass whose flags have no prefix."""
        return cls(**{name: made[name] for name in self.command.fields_of(cls) if name in made})

    def with_preset(self, flag: str, preset: str | None) -> Given:
        """The same with another preset of a class, or none."""
        others = {name: own for name, own in self.presets.items() if name != flag}
        return replace(self, presets=others if preset is None else {**others, flag: preset})


def read_command(
    command: CommandLine,
    words: Sequence[str],
    default_config: Path | None,
    description: str = "",
    prepare: Callable[[dict[str, Any], dict[str, str]], None] = lambda file, options: None,
) -> Given:
    """A command line to settings: the YAML file, then the flags, each of which has one value.

    Args:
        default_config: None for a command that needs no file.
        description: what `--help` begins with.
        prepare: changes the file's settings where flags ask for others, before both are put together.

    Raises ValueError for an unknown flag or key, a value of another type, a flag that stands twice, one without a
    value, a class that isn't there, a token in any place, and where required flags are missing; OSError for a missing
    file.
    """
    if {"-h", "--help"} & set(words):
        for kind in command.classes.values():
            classes_in(kind)  # imported, so that the parser knows them
        show_help(command, default_config, description)
    parser = command.parser
    options = split_words(words, command)
    for flag, kind in command.classes.items():
        if f"{flag}.help" in options:
            print(settings_of(flag, class_at(class_path(options[f"{flag}.help"], kind, flag))))
            raise SystemExit(0)
    shows = options.pop("print_config", "false")
    if shows not in ("true", "false"):
        raise ValueError(f"--print_config {shows!r} must be true or false.")
    given_config = options.pop("config", None if default_config is None else str(default_config))
    config = Path(given_config or "the flags")
    file = {} if given_config is None else read_file(config)
    for told in (file, options):
        refuse_tokens(told, "settings")
        check_text(told, "settings")
    file = known_settings(file, command, f"key in {config.name}")
    for group in set(command.groups) & set(options):  # here, since jsonargparse would take a file's name too
        file.pop(group, None)
        file |= known_settings({group: typed_text(options.pop(group))}, command, "setting")
    prepare(file, options)
    settled = {flag: settle_class(flag, kind, file, options) for flag, kind in command.classes.items()}
    presets = {flag: preset for flag, preset in settled.items() if preset is not None}
    for flag in options:
        _drop(file, flag)  # jsonargparse would put lists and mappings of both together
    hidden = [str(value) for told in (file, options) for key, value in told.items() if is_token_key(key) and value]
    values = parsed(lambda: parser.parse_object(file, defaults=False), hidden, f"{config}: ")
    flags = [f"--{key}={text}" for key, text in options.items()]
    values = parsed(lambda: parser.parse_args(flags, namespace=values, defaults=False), hidden)
    settings = checked(values, file, {flag: typed_text(text) for flag, text in options.items()}, command)
    if shows == "true":
        show(parser, filled(values, command, presets))
    for flag, preset in presets.items():
        _put(settings, f"{flag}.init_args.preset", preset)
    given = Given(settings, values, presets, parser, command)
    missing = [flag for flag in command.required if given.asked(flag) in (None, "", [], ())]
    if missing:
        raise ValueError(f"missing: {', '.join(missing)}; give them as flags, or in the YAML file.")
    return given


def read_file(config: Path) -> dict[str, Any]:
    """The settings of a YAML file. Raises OSError if there is none, ValueError for one that is no mapping."""
    if not config.is_file():
        raise OSError(f"--config {str(config)!r} is not a file.")
    file = parse_yaml(read_text(config), str(config)) or {}
    if not isinstance(file, dict):
        raise ValueError(f"{config} must hold keys, such as output_dir.")
    return file


def checked(
    values: Namespace, file: Mapping[str, Any], options: Mapping[str, Any], command: CommandLine
) -> dict[str, Any]:
    """What jsonargparse read, as plain values, looked at once more: nulls, and numbers that YAML reads in its own way.
    Mappings of anything get numbers and truth values, there and in `values`.
    """
    settings = values.as_dict()
    for name, hint in command.hints.items():
        asked = _inner(settings, name)
        if name in values and asked is None and hint and not {Any, NoneType} & set(_options(hint)):
            raise ValueError(f"{name}=null must not be empty.")
        if isinstance(asked, dict) and any(option is dict or get_origin(option) is dict for option in _options(hint)):
            values[name] = plain_value(asked)
            _put(settings, name, values[name])
    check_numbers(file, {key: value for key, value in settings.items() if key not in options}, "")
    for flag, text in options.items():
        check_numbers(text, _inner(settings, flag), flag)
    return settings


def split_words(words: Sequence[str], command: CommandLine) -> dict[str, str]:
    """Flags with their values. A switch may stand without one."""
    known = [action.dest for action in command.parser._actions if action.help != SUPPRESS]
    switches = [name for name, hint in command.hints.items() if hint is bool]
    found: dict[str, str] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"{word!r} stands alone; options are written --name VALUE.")
        key, equals, value = word[2:].partition("=")
        if key not in known and not any(key.startswith(f"{flag}.") for flag in command.classes):
            raise ValueError(f"unknown option --{key}; {nearest(key, known)}")
        if not equals:
            alone = not rest or rest[0].startswith("--")
            if alone and key not in switches:
                raise ValueError(f"--{key} has no value.")
            value = "true" if alone else rest.pop(0)
        if key in found:
            raise ValueError(f"--{key} is given twice; give it one value.")
        found[key] = value
    return found


def known_settings(file: Mapping[Any, Any], command: CommandLine, what: str) -> dict[str, Any]:
    """The settings of a file, without groups that it leaves empty. Raises ValueError for keys that there are no flags
    of, and a group that is none.
    """
    flags = [action.dest for action in command.parser._actions if action.dest not in ("help", "config")]
    for key, value in file.items():
        names, group = {key: [flag for flag in flags if "." not in flag]}, key in command.groups
        if group and value is not None:
            if not isinstance(value, Mapping):
                raise ValueError(f"{key}={value!r} must hold settings by their names.")
            names |= {f"{key}.{inner}": flags for inner in value}
        for name, known in names.items():
            if name not in known:
                raise ValueError(f"unknown {what}: {name!r}; {nearest(name, known)}")
    return {key: value for key, value in file.items() if key not in command.groups or value is not None}


def nearest(name: Any, known: Iterable[str], otherwise: str = "--help lists all.") -> str:
    """A hint at the known name that a wrong one is nearest to."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else otherwise


def parsed(parse: Callable[[], Namespace], hidden: Iterable[str], where: str = "") -> Namespace:
    """What jsonargparse makes of something; its errors in one line, without the values of tokens."""
    try:
        return parse()
    except (ArgumentError, ValueError, TypeError, KeyError) as error:
        line = where + one_line(str(error))
        for text in hidden:
            line = line.replace(text, SHOWN)
        raise ValueError(without_tokens(line[:LONGEST_ERROR])) from None


def one_line(message: str) -> str:
    """A message of jsonargparse without what its own types are called."""
    left_out = (
        "Given value: NestedArg",
        "Does not validate",
        "Subtypes:",
        "Errors:",
        "Given value type",
        "- Expected a <class 'NoneType'>",
    )
    lines = [line.strip() for line in message.splitlines()]
    kept = [line.removeprefix("- ") for line in lines if line and not line.startswith(left_out)]
    text = "; ".join(dict.fromkeys(kept)).replace(":; ", ": ")
    return re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", text).replace("Parser key ", "")


def settle_class(flag: str, kind: ClassFlag, file: dict[str, Any], options: dict[str, str]) -> str | None:
    """Put dotted paths in the place of classes' names, and take the preset out; its name.

    Where the flags name another class than the file, the file's settings of its own class go.
    """
    spec, text = _inner(file, flag), options.pop(flag, None)
    told = spec if text is None else None if text == "null" else typed_text(text)
    if kind.several:
        if told is not None:
            told = [resolved(inner, kind, flag) for inner in (told if isinstance(told, list) else [told])]
        if spec is not None or text is not None:
            _put(file, flag, told)
        return None
    before, spec = [None if one is None else resolved(one, kind, flag) for one in (spec, told)]
    if isinstance(before, dict) and isinstance(spec, dict) and spec == {"class_path": before["class_path"]}:
        spec = before
    if before is not None or text is not None:
        _put(file, flag, spec)
    nested = [key for key in options if key.startswith(f"{flag}.")]
    if not isinstance(spec, dict):
        if nested:
            raise ValueError(f"--{nested[0]} is a setting of a class; give --{flag} CLASS.")
        return None
    arguments = spec.get("init_args") or {}
    if not isinstance(arguments, dict):
        raise ValueError(f"{flag}.init_args={arguments!r} must hold the settings of the class.")
    preset = arguments.pop("preset", None)
    preset = options.pop(f"{flag}.preset", preset)
    asked: dict[str, Any] = {}
    for key in set(nested) & set(options):
        _put(asked, key.removeprefix(f"{flag}."), typed_text(options[key]))
    for settings in (arguments, asked):
        check_arguments(flag, class_at(spec["class_path"], flag), settings)
    return None if preset == "null" else preset


def check_arguments(flag: str, cls: type, arguments: Mapping[str, Any]) -> None:
    """Raise ValueError, with the nearest known name, for settings that a class, or a class inside it, doesn't have."""
    known = list(inspect.signature(cls).parameters)
    for name, value in arguments.items():
        if name not in known:
            hint = nearest(name, known, f"known: {', '.join(known) or 'none'}.")
            raise ValueError(f"unknown setting {flag}.{name}: {cls.__name__} has no {name!r}; {hint}")
        inside = next((own for own in _options(_hints(cls).get(name)) if is_dataclass(own)), None)
        if isinstance(value, Mapping) and isinstance(inside, type) and "class_path" not in value:
            check_arguments(f"{flag}.{name}", inside, value)


def resolved(spec: Any, kind: ClassFlag, flag: str) -> Any:
    """A class as a mapping with its dotted path; a text with a meaning of its own as it is.

    Raises ValueError for anything else.
    """
    if isinstance(spec, str):
        known = {plain_name(name) for name in classes_in(kind)}
        if kind.names and "." not in spec and plain_name(spec) not in known:
            return spec
        spec = {"class_path": spec}
    if not isinstance(spec, dict) or not isinstance(spec.get("class_path"), str):
        raise ValueError(f"{flag}={spec!r} must be a class, or a mapping with class_path and init_args.")
    unknown = [key for key in spec if key not in ("class_path", "init_args")]
    if unknown:
        raise ValueError(f"{flag}.{unknown[0]} is no key beside class_path; settings stand under init_args.")
    arguments = {} if spec.get("init_args") is None else {"init_args": spec["init_args"]}
    return {"class_path": class_path(spec["class_path"], kind, flag), **arguments}


def class_path(name: str, kind: ClassFlag, flag: str) -> str:
    """The dotted path of a class that can be made.

    Raises ValueError for a name that there is no class of, a path that can't be imported, and a class of another kind.
    """
    if "." not in name:
        known = classes_in(kind)
        found = next((cls for own, cls in known.items() if plain_name(own) == plain_name(name)), None)
        if found is None:
            near = difflib.get_close_matches(plain_name(name), {plain_name(own): own for own in known}, n=1)
            own = [own for own in known if plain_name(own) in near]
            hint = nearest(own[0], own) if own else f"known: {', '.join(known)}, or the dotted path of your own."
            raise ValueError(f"{flag}={name!r} is unknown; {hint}")
        return f"{found.__module__}.{found.__qualname__}"
    found = class_at(name, flag)
    if not isinstance(found, type) or not issubclass(found, kind.base):
        raise ValueError(f"{flag}={name!r} is no {kind.base.__name__}; name a class that is one.")
    if inspect.isabstract(found):
        raise ValueError(f"{flag}={name!r} is abstract; name a class that fills it in.")
    return f"{found.__module__}.{found.__qualname__}"


def class_at(path: str, flag: str = "class") -> Any:
    """The class at a dotted path. Raises ValueError if there is none; modules of the current folder are found too."""
    module, _, name = path.rpartition(".")
    sys.path.append(os.getcwd())
    try:
        return getattr(import_module(module), name)
    except (Exception, SystemExit) as error:  # whatever the module brings up
        why = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{flag}={path!r} can't be imported ({why}); give package.module.Class.") from None
    finally:
        sys.path.remove(os.getcwd())


def classes_in(kind: ClassFlag) -> dict[str, type]:
    """The classes of a kind that can be made, in the modules of its packages, by name."""
    found = {}
    for package in kind.packages:
        for module in pkgutil.iter_modules(import_module(package).__path__, f"{package}."):
            for name, cls in vars(import_module(module.name)).items():
                if isinstance(cls, type) and issubclass(cls, kind.base) and cls.__module__ == module.name:
                    found[name] = cls
    return {name: cls for name, cls in found.items() if not name.startswith("_") and not inspect.isabstract(cls)}


def plain_name(name: str) -> str:
    """A name as it is compared: PMGAFT is pmg_aft too."""
    return name.replace("_", "").replace("-", "").lower()


def filled(values: Namespace, command: CommandLine, presets: Mapping[str, str]) -> Namespace:
    """What was asked for, and of each class what nobody asked for and jsonargparse would not take from it.

    A dataclass inside a class is made there by the defaults of its own fields, whatever the class has in its place.
    And of a preset all is put in that differs from the defaults.
    """
    values = values.clone()
    for flag, kind in command.classes.items():
        spec = None if kind.several else values.get(flag)
        cls = class_at(spec["class_path"]) if isinstance(spec, Namespace) else None
        if isinstance(spec, Namespace) and is_dataclass(cls):
            start = preset_of(cls, presets[flag], flag) if flag in presets else None  # type: ignore[arg-type]
            if vars(own := _filled(cls, spec.get("init_args"), start)):
                values[flag] = Namespace(class_path=spec["class_path"], init_args=own)
    return values


def _filled(cls: Any, asked: Namespace | None, start: Any) -> Namespace:
    """What was asked for of a dataclass, and else all of `start` that isn't the default."""
    found = Namespace() if asked is None else asked.clone()
    for field in fields(cls):
        default = field.default_factory() if callable(field.default_factory) else field.default
        value = default if start is None else getattr(start, field.name)
        inside = is_dataclass(value) and type(value) in _options(_hints(cls).get(field.name))
        if inside and isinstance(found.get(field.name, Namespace()), Namespace):
            if vars(inner := _filled(type(value), found.get(field.name), value)):
                found[field.name] = inner
        elif field.init and field.name not in found and value != default:
            found[field.name] = value
    return found


def preset_of(cls: type, preset: str, flag: str) -> Any:
    """What `cls.NAME_preset` makes."""
    known = {name.removesuffix("_preset"): getattr(cls, name) for name in dir(cls) if name.endswith("_preset")}
    if preset not in known:
        raise ValueError(
            f"{flag}.preset={preset!r} is unknown; {cls.__name__} has {', '.join(known) or 'no presets'}."
        )
    return known[preset]()


def show_help(command: CommandLine, config: Path | None, description: str) -> NoReturn:
    """Print all flags with their meaning, and those of the classes that a config names; and end. Defaults are those
    of the config, where it says something.
    """
    file = {} if config is None else read_file(config)
    parser = replace(command).parser  # one of its own, whose defaults may be others
    for action in parser._actions:
        told = _inner(file, action.dest)
        if told is not None:
            action.default = (
                told.get("class_path") if action.dest in command.classes and isinstance(told, dict) else told
            )
    parser.description = description.strip()
    parser.print_help()
    for flag, kind in command.classes.items():
        spec = _inner(file, flag)
        spec = None if spec is None or kind.several else resolved(spec, kind, flag)
        if isinstance(spec, dict):
            print(f"\n{settings_of(flag, class_at(spec['class_path'], flag), spec.get('init_args'))}", end="")
    raise SystemExit(0)


def settings_of(flag: str, cls: type, told: Mapping[str, Any] | None = None) -> str:
    """The settings of a class as flags, with their meaning; `told` are those that a config gives, a preset too."""
    lines, helps, told = [f"{cls.__name__}: {said_of(cls)}"], helps_of(cls), told or {}
    start = vars(preset_of(cls, told["preset"], flag)) if told.get("preset") else {}
    for name, parameter in inspect.signature(cls).parameters.items():
        value = {name: parameter.default, **start, **told}[name]
        default = "" if value is parameter.empty else f" (default: {value})"
        text = f"{helps.get(name, '')}{default}".strip()
        lines += [f"  --{flag}.{name}", *textwrap.wrap(text, 79, initial_indent=" " * 24, subsequent_indent=" " * 24)]
    return "\n".join(lines) + "\n"


def show(parser: ArgumentParser, values: Namespace) -> NoReturn:
    """Print all settings, with their defaults, as YAML, and end."""
    whole = parser.parse_object(values.as_dict()).as_dict()
    settings = without_token_keys({k: v for k, v in whole.items() if k not in ("config", "print_config")})
    print(without_tokens(yaml.safe_dump(_plain(settings), sort_keys=False, allow_unicode=True)), end="")
    raise SystemExit(0)


def said_of(cls: type) -> str:
    """The first sentence of a class's docstring, without its full stop."""
    return " ".join((inspect.getdoc(cls) or "").partition("\n\n")[0].split()).partition(". ")[0].rstrip(".")


def helps_of(cls: type) -> dict[str, str]:
    """A help text for each field of a dataclass: its own, or what the docstring of the class, or of one that it
    inherits from, says under Args.
    """
    found: dict[str, str] = {}
    for parent in reversed(cls.__mro__):
        if not is_dataclass(parent):
            continue
        section = (inspect.getdoc(parent) or "").partition("Args:\n")[2]
        for line in re.split(r"\n(?=    \w[\w, ]*:)", section.partition("\n\n")[0]):
            names, colon, text = line.partition(":")
            if colon:
                found |= dict.fromkeys((name.strip() for name in names.split(",")), " ".join(text.split()))
    own = {f.name: f.metadata["help"] for f in fields(cls) if "help" in f.metadata}
    return {name: text.replace("%", "%%") for name, text in found.items()} | own  # the others' are escaped


def packaged_config(name: str) -> Path:
    """The YAML file of a name among those that come with the package: `pmg_aft`, `digits-clip/pmg_aft`.

    Raises ValueError for an unknown one.
    """
    configs = recipes_folder() / "configs"
    known = {path.relative_to(configs).with_suffix("").as_posix(): path for path in sorted(configs.rglob("*.yaml"))}
    for own in (name, f"digits-clip/{name}"):
        if own in known:
            return known[own]
    short = [own.removeprefix("digits-clip/") for own in known]
    hint = nearest(name, [*known, *short], f"known: {', '.join(own for own in short if '/' not in own)}.")
    raise ValueError(f"there is no config {name!r}; {hint}")


def recipes_folder() -> Path:
    """Where recipes and their configs are: in the installed package, or in a checkout beside it."""
    installed = Path(__file__).parent / RECIPES
    return installed if installed.is_dir() else Path(__file__).parents[1] / RECIPES


def _dotted(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _hints(cls: type) -> dict[str, Any]:
    """The types of a class's settings; none where they can't be told."""
    try:
        return get_type_hints(cls)
    except NameError:  # a type that is imported for checkers alone
        return {}


def _inner(settings: Any, flag: str) -> Any:
    """What stands under a dotted flag; settings of a class under its name alone."""
    for part in flag.split("."):
        if isinstance(settings, Mapping) and "class_path" in settings and part not in settings:
            settings = settings.get("init_args")
        settings = settings.get(part) if isinstance(settings, Mapping) else None
    return settings


def _put(settings: dict[str, Any], flag: str, value: Any) -> None:
    *parents, last = flag.split(".")
    for part in parents:
        settings = settings.setdefault(part, {})
    settings[last] = value


def _drop(settings: Any, flag: str) -> None:
    """Take out what stands under a dotted flag."""
    *parents, last = flag.split(".")
    for part in parents:
        settings = _inner(settings, part)
    if isinstance(settings, dict) and "class_path" in settings and last not in settings:
        settings = settings.get("init_args")
    if isinstance(settings, dict):
        settings.pop(last, None)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
