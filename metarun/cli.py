"""The command line: argv -> command -> Hydra -> the command's function.

Torch is not imported here, so that help and mistakes in the command line are answered quickly.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import re
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

import metarun

HERE = Path(__file__).resolve().parent
# Inside the wheel, or beside the package in a checkout or an editable install.
CONF = next((p for p in (HERE / "conf", HERE.parent / "conf") if p.is_dir()), HERE / "conf")

COMMANDS = {
    "train": "metarun.commands.train",
    "eval": "metarun.commands.evaluate",
    "adapt": "metarun.commands.adapt",
    "data": "metarun.commands.data",
}

HELP = """\
metarun {version}: meta-learning experiments from the command line

  metarun train  [group=option ...] [key=value ...] [-m]   meta-train an algorithm
  metarun eval   checkpoint=RUN [ways=[5,20] shots=[1,5]]  evaluate checkpoints on a grid of tasks
  metarun adapt  checkpoint=RUN [support=FOLDER query=FOLDER]  adapt to a new task, also of your own images
  metarun data   [dataset=NAME]                            what data there is; prepare and look at one

A first result in two minutes, without any download:
  metarun train
  metarun eval checkpoint=outputs/...        the run's folder, as `train` prints it

More to type:
  metarun train algorithm=maml dataset=omniglot ways=20 shots=5
  metarun train -m algorithm=maml,protonet seed=0,1          a sweep over all combinations
  metarun train --help                       every group, option and setting
  metarun train --cfg job                    the whole config, without running it
"""

# Settings that hold a path: what Hydra's grammar would trip over is quoted for the user.
PATH_KEYS = re.compile(r"checkpoint|support|query|resume|dataset\.(settings\.\w+\.)?root")

PART = re.compile(r"dataset\.parts\.([\w-]+)")  # one dataset of a mixture

# Hydra's flags, those followed by a word first.
VALUED_FLAGS = [
    "-c",
    "--cfg",
    "-p",
    "--package",
    "-i",
    "--info",
    "-cn",
    "--config-name",
    "-cd",
    "--config-dir",
    "-cp",
    "--config-path",
    "-e",
    "--experimental-rerun",
]
PLAIN_FLAGS = [
    "-h",
    "--help",
    "--hydra-help",
    "--version",
    "--resolve",
    "-r",
    "--run",
    "-m",
    "--multirun",
    "-sc",
    "--shell-completion",
]


def main(argv: list[str] | None = None) -> NoReturn:
    """Run a command and exit: 0 done, 1 a bad value, 2 bad usage, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP.format(version=metarun.__version__), end="")
        sys.exit(0 if arguments else 2)
    if arguments[0] == "--version":
        print(f"metarun {metarun.__version__}")
        sys.exit(0)
    name, *rest = arguments
    if name in ("-sc", "--shell-completion"):
        name, rest = completed_command(), arguments
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"commands: {', '.join(COMMANDS)}"
        fail(f"{name!r} is not a command; {hint}", status=2)
    run(name, rest)
    sys.exit(0)


def run(name: str, arguments: list[str]) -> None:
    """Compose the command's config and run it; mistakes end in one line on standard error."""
    import hydra

    from metarun.config import register_frames

    register_frames()
    warnings.filterwarnings("ignore", module=r"PIL\.")  # what cannot be read is told by name
    sys.argv = [f"metarun {name}", *arrange(name, arguments)]
    sys.path.append(os.getcwd())  # for a user's own classes
    # Let errors come here whole, to be told in one line each; `HYDRA_FULL_ERROR=1` shows them raw.
    raw = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"

    def task(cfg: Any) -> Any:
        return guarded(name, cfg, raw)

    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(task)()
    except KeyboardInterrupt:
        fail("interrupted", status=130)
    except BrokenPipeError:  # such as `| head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if raw:
            raise
        fail(explained(error, name), status=1)


def guarded(name: str, cfg: Any, raw: bool) -> Any:
    """The command's result; a mistake ends the program, or in a sweep this job alone."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    try:
        return importlib.import_module(COMMANDS[name]).run(cfg)
    except KeyboardInterrupt:
        remove_notes(Path(HydraConfig.get().runtime.output_dir))
        raise
    except Exception as error:
        if raw:
            raise
        message = explained(error, name)
        folder = Path(HydraConfig.get().runtime.output_dir)
        remove_notes(folder)
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            from metarun.sweep import record_failure

            print(f"metarun: error: {message}", file=sys.stderr)
            return record_failure(folder, message)
        fail(message, status=1)


def explained(error: Exception, name: str) -> str:
    """One line for a mistake; a fault of ours goes on with its traceback."""
    from metarun.explain import explain

    message = explain(error, name, sys.argv[1:])
    if message is None:
        raise error
    return message


def remove_notes(folder: Path) -> None:
    """Remove the config's notes from a folder that holds nothing else, and what that leaves empty."""
    if not folder.is_dir() or not {path.name for path in folder.iterdir()} <= {".hydra"}:
        return
    shutil.rmtree(folder / ".hydra", ignore_errors=True)
    with contextlib.suppress(OSError):  # not empty
        for empty in (folder.resolve(), folder.resolve().parent):
            if empty != Path.cwd():
                empty.rmdir()


def arrange(name: str, arguments: list[str]) -> list[str]:
    """Flags before overrides, as Hydra's parser wants; paths quoted; a resumed run in its own folder."""
    flags = [a for a in arguments if not is_override(a)]
    overrides = [quote_path(a) for a in arguments if is_override(a)]
    for before, word in zip(["", *flags], flags, strict=False):
        if word.startswith("-"):
            check_flag(name, word.partition("=")[0])
        elif before not in VALUED_FLAGS:
            fail(f"{word!r} is neither a setting (key=value) nor a flag; see metarun {name} --help", status=2)
    if name == "train":
        overrides = pairing(overrides) + overrides
    overrides += parts_of(overrides)
    # Datasets are names that Hydra does not know before.
    overrides = [f"++{a}" if PART.fullmatch(a.partition("=")[0]) else a for a in overrides]
    resume = [a.partition("=")[2].strip("'\"") for a in arguments if a.startswith("resume=")]
    if name != "train" or resume:
        # `dataset.root=...` adjusts the checkpoint's own dataset, which Hydra knows nothing of.
        overrides = [f"++{a}" if a.startswith("dataset.") else a for a in overrides]
    if name == "train" and resume:
        folder = Path(resume[-1]).expanduser()
        folder = folder if folder.is_dir() else folder.parent
        overrides.append(f"hydra.run.dir={quoted(str(folder))}")
    return flags + overrides


def pairing(overrides: list[str]) -> list[str]:
    """What the chosen dataset asks of the other groups (conf/pairing), weaker than anything typed.

    Hydra has no defaults list that depends on a choice and may override another group.
    """
    chosen = dict(a.split("=", 1) for a in overrides if not a.startswith("~"))
    name = chosen.get("dataset", "")
    paired = "pairing" not in chosen and (CONF / "pairing" / f"{name}.yaml").is_file()
    return [f"pairing={name}"] if paired else []


def parts_of(overrides: list[str]) -> list[str]:
    """The options of group `dataset` that a mixture is of, each put below `dataset.settings`.

    So each brings its own settings, which can be typed and are checked like any other.
    """
    chosen = dict(a.lstrip("+").split("=", 1) for a in overrides if not a.startswith("~"))
    dataset = chosen.get("dataset", "")
    if dataset != "mixture":
        if "mixture" in dataset.split(","):
            fail(f"dataset={dataset}: only a mixture has parts; sweep over it by itself", status=1)
        return []
    names = [match[1] for key in chosen if (match := PART.fullmatch(key))]
    for parts in re.split(r"[}]", chosen.get("dataset.parts", "")):  # a sweep has several
        own = re.findall(r"([\w-]+)[\"']?\s*:", parts)
        if twice := [name for name in own if own.count(name) > 1]:
            fail(f"dataset.parts: {twice[0]} is there twice; name each dataset once", status=1)
        names += own
    packages = {f"dataset@dataset.settings.{name}": name for name in dict.fromkeys(names)}
    return [f"+{package}={name}" for package, name in packages.items() if package not in chosen]


def is_override(argument: str) -> bool:
    return argument.startswith("~") or ("=" in argument and not argument.startswith("-"))


def check_flag(name: str, flag: str) -> None:
    if flag not in VALUED_FLAGS + PLAIN_FLAGS:
        close = difflib.get_close_matches(flag, VALUED_FLAGS + PLAIN_FLAGS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"see metarun {name} --help"
        fail(f"{flag} is not a flag; {hint}", status=2)


def quote_path(override: str) -> str:
    """A path's override in quotes, so that no character of it is read as Hydra's grammar; `~` is home.

    What is quoted already, null, and interpolations stay as they are.
    """
    key, _, value = override.partition("=")
    if not PATH_KEYS.fullmatch(key) or value == "null" or value[:1] in ("'", '"', "$"):
        return override
    if value.startswith("[") and value.endswith("]"):
        return f"{key}=[{','.join(quoted(item.strip()) for item in value[1:-1].split(','))}]"
    if not value:
        fail(f"{key}= is empty; name a path", status=1)
    return f"{key}={quoted(value)}"


def quoted(path: str) -> str:
    if path[:1] in ("'", '"'):
        return path
    path = os.path.expanduser(path).replace("'", "\\'").replace("${", "\\${")
    return f"'{path}'"


def completed_command() -> str:
    """The command on the line being completed, taken out of it: Hydra knows of no subcommands."""
    line = os.environ.get("COMP_LINE", "")
    for name in COMMANDS:
        before, found, after = line.partition(f" {name} ")
        if found:
            os.environ["COMP_LINE"] = f"{before} {after}"
            point = int(os.environ.get("COMP_POINT", len(line)))
            os.environ["COMP_POINT"] = str(point - len(name) - 1)
            return name
    return "train"


def fail(message: str, status: int) -> NoReturn:
    prefix = "metarun: " if status == 130 else "metarun: error: "
    print(prefix + message, file=sys.stderr)
    sys.exit(status)
