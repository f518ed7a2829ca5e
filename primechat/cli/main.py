"""The command line: one verb per stage, plus the small programs in `primechat.cli`.

Flags become a config here: their names, types and help come from the config's dataclass. torch is imported
when a verb runs, never for help. Only this module installs signal handlers, because Python allows that on the
main thread only. Reference: tyro.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import importlib
import inspect
import io
import os
import re
import shlex
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

import primechat
from primechat import events
from primechat.cli import output
from primechat.errors import ConfigError, PrimechatError, StoppedError
from primechat.files.paths import explain_refusal, is_clone, resolve_path

CLOUD = "cli.cloud"  # its verbs parse their own flags
STAGES = {  # verb: (public name of the stage, name of its config, help sentence)
    "train-tokenizer": (
        "train_tokenizer",
        "TokenizerConfig",
        "learn which pieces of words become tokens",
    ),
    "pretrain": ("pretrain", "PretrainConfig", "train a base model to go on with any text"),
    "finetune": ("finetune", "FinetuneConfig", "teach a base model to answer"),
    "lora": ("train_lora", "LoRAConfig", "teach a model a manner or topic by an adapter"),
    "distill": ("distill", "DistillConfig", "teach a small model what a large one knows"),
    "evaluate": (
        "evaluate",
        "EvaluateConfig",
        "measure a model in bits per byte on text it has not seen",
    ),
    "autochat": (
        "autochat",
        "AutochatConfig",
        "let models talk to each other, every token measured",
    ),
    "speedrun": (
        "speedrun",
        "SpeedrunConfig",
        "a full run on GPUs: tokenizer, base, chat, evaluation",
    ),
    "quickstart": ("quickstart", "QuickstartConfig", "tokenizer, base and chat model in minutes"),
}
PROGRAMS = {  # verb: (module that defines `run_VERB`, name of its config, help sentence)
    "lab": (
        "labkit.twins",
        "LabConfig",
        "open the labs: notebooks to learn by, in JupyterLab or marimo",
    ),
    "chat": ("chat.terminal", "ChatConfig", "talk to a model in the terminal"),
    "download": ("cli.download", "DownloadConfig", "bring models from the Hugging Face Hub"),
    "convert": (
        "cli.convert",
        "ConvertConfig",
        "turn a classic model into a Hugging Face folder, or back",
    ),
    "check": ("cli.check", "CheckConfig", "tell what a model is and whether it is sound"),
    "models": (
        "cli.models",
        "ModelsFlags",
        "list the models here, show what they take, remove some",
    ),
    "plan": (CLOUD, "", "tell what a run needs: memory, disk, hours, dollars"),
    "export": (CLOUD, "", "write a lab as a folder that runs on rented GPUs"),
    "preflight": (CLOUD, "", "test a rented machine in a minute, before money is spent"),
    "pull": (CLOUD, "", "bring a run home from a rented machine"),
    "report": (
        "cli.report",
        "ReportFlags",
        "write a run's curves and samples as one page and pictures",
    ),
    "bench": (
        "cli.bench",
        "BenchConfig",
        "measure how fast this machine trains, generates and tokenizes",
    ),
}
# Verbs that leave files behind: they run to the end even if nobody reads what they print.
LASTING = {*STAGES, "download", "convert", "export", "pull", "report"} - {"evaluate"}
REFUSALS = (  # error numbers that mean a problem with the disk, not with the program
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ENXIO, errno.ESTALE),
    *(errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR),
    *(errno.EMFILE, errno.ENFILE),
)
FEW_STEPS = 40  # a quickstart with fewer steps gives a model that does not write words yet
SHORTCUTS = {
    "--device": "--device cpu|mps|cuda stands for --runtime.device.",
    "--max-hours": "--max-hours H saves and stops after so many hours; a speedrun: of pretraining.",
    "--max-dollars": "--max-dollars D saves and stops when so much is spent, at --dollars-per-hour.",
    "--dollars-per-hour": "--dollars-per-hour D is the machine's price, for --max-dollars.",
    "--config": "--config FILE starts from a saved config.json or a run's folder; flags override it.",
    "--depth": "--depth N sets the model's shape for N blocks, and the tag to dN.",
    "--recipe": "--recipe october2025|nanochat2026|quickstart starts from all settings of one of these runs.",
    "--arch": "--arch classic|modern takes the switches of nanochat's 2025 or 2026 model.",
}

Config = TypeVar("Config")


def main(argv: list[str] | None = None) -> int:
    """Run one command line and return its exit code.

    A verb that writes files does not depend on its output: a training run whose reader leaves still saves
    and exits with 0.

    Args:
        argv: the words after `primechat`; None takes those of the process.

    Returns:
        0 on success and after a clean stop that saved; 1 if a check finds a fault or the output cannot be
        written; 2 for an error that the user can fix; 130 for an interrupt that saves nothing; 141 if the
        reader of a verb that only prints has gone (`primechat models | head -1`).
    """
    with output.guard_streams():
        output.require_output()
        try:
            try:
                code = run_verb(list(sys.argv[1:] if argv is None else argv))
            except SystemExit as error:  # raised by tyro after a help text or a wrong flag
                code = error.code if isinstance(error.code, int) else 0
            sys.stdout.flush()
            return code
        except KeyboardInterrupt:
            print(file=sys.stderr)
            return 130
        except output.OutputLost as loss:
            return explain_loss(loss)
        except Exception as error:
            return explain_end(error)


def explain_loss(loss: output.OutputLost) -> int:
    """Return the exit code for lost output; print the reason unless the reader has simply left."""
    if loss.reader_gone:
        return output.READER_GONE
    print(
        f"primechat: the output cannot be written ({loss.reason}), so the result is lost; free some space, "
        "or write it elsewhere.",
        file=sys.stderr,
    )
    return 1


def explain_end(error: Exception) -> int:
    """Return the exit code for an exception, and print its reason once for all ranks of a machine.

    A rank that fails only because another rank has gone prints nothing. An error in the program itself is
    shown as a traceback.
    """
    alone, rank = os.environ.get("WORLD_SIZE", "1") == "1", os.environ.get("RANK", "0")
    who = "primechat" if rank == "0" else f"primechat (rank {rank})"
    if isinstance(error, OSError) and error.errno in REFUSALS:
        error = explain_refusal(error)
    if isinstance(error, PrimechatError):
        if alone or claim_report():
            print(f"{who}: {error}", file=sys.stderr, flush=True)
        code = 130 if isinstance(error, StoppedError) else 2
        return code if alone else leave_at_once(code)
    if alone:
        raise error
    from primechat.train.parallel import is_echo

    if not is_echo(error) and claim_report():
        traceback.print_exception(error)
        print(
            f"{who} failed, so all ranks end; resume from the last checkpoint.",
            file=sys.stderr,
            flush=True,
        )
    return leave_at_once(1)


def leave_at_once(code: int) -> NoReturn:
    """Exit at once; the interpreter's normal shutdown may wait for ranks that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def claim_report() -> bool:
    """Return whether this rank is the first on its machine to report on this launch."""
    start = [os.environ.get(name, "") for name in ("MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")]
    path = Path(tempfile.gettempdir()) / f"primechat-end-{os.getppid()}-{'-'.join(start)}"
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        return True
    return False


def run_verb(argv: list[str]) -> int:
    """Run the verb that the words begin with and return its exit code."""
    device = take_option(argv, "--device")
    verb = argv.pop(0).replace("_", "-") if argv else "--help"
    if verb in LASTING and not {"-h", "--help"} & {*argv}:
        output.require_output(False)
    if verb in ("-h", "--help", "help"):
        print(format_help())
    elif verb == "--version":
        print(f"primechat {primechat.__version__}")
    elif verb in STAGES:
        return run_stage(verb, argv, device)
    elif verb in PROGRAMS:
        place, config, _ = PROGRAMS[verb]
        module = importlib.import_module(f"primechat.{place}")
        if place == CLOUD:
            return int(module.run_cloud(verb, argv))
        cls: Any = getattr(module, config)
        start = cls(device=device) if device and hasattr(cls, "device") else cls()
        if verb in ("check", "chat", "report") and argv and not argv[0].startswith("-"):
            argv = ["--model", *argv]  # as in `primechat chat sft/d4`
        return int(getattr(module, f"run_{verb}")(parse_flags(verb, cls, argv, start)))
    else:
        near = difflib.get_close_matches(verb, [*STAGES, *PROGRAMS], 1)
        remedy = (
            f"did you mean `primechat {near[0]}`?" if near else "`primechat --help` lists them."
        )
        raise ConfigError(f"{verb!r} must be one of primechat's verbs; {remedy}")
    return 0


def format_help() -> str:
    """Return the text of `primechat --help`."""
    verbs: dict[str, tuple[str, ...]] = {**STAGES, **PROGRAMS}
    table = "\n".join(f"  {verb:17}{known[-1]}" for verb, known in verbs.items())
    return f"""\
primechat makes a small ChatGPT before your eyes and lets you talk to it.

Start here:
  primechat quickstart   a tokenizer, a base model and a chat model, then a short dialogue
  primechat chat         talk to your model, or to the one that ships if that is clearly better

Verbs:
{table}

`primechat VERB --help` shows the settings of one verb; --device cpu|mps|cuda fits all of them.
Models and data are kept in ~/.cache/nanochat, or where NANOCHAT_BASE_DIR points."""


def take_option(argv: list[str], name: str) -> str | None:
    """Remove `name VALUE` or `name=VALUE` from the words and return the value, or None if it is absent."""
    value = None
    for word in [word for word in argv if word == name or word.startswith(f"{name}=")]:
        i = argv.index(word)
        value = word[len(name) + 1 :] if "=" in word else "".join(argv[i + 1 : i + 2])
        if not value or value.startswith("--"):
            raise ConfigError(
                f"{name} stands alone, a value must follow it; {SHORTCUTS.get(name, 'try -o FOLDER.')}"
            )
        del argv[i : i + (1 if "=" in word else 2)]
    return value


def parse_flags(
    verb: str, cls: type[Config], argv: list[str], default: Config, notes: str = ""
) -> Config:
    """Return the config that the flags describe, as parsed by tyro.

    An error raised by the config itself is raised as it is, without tyro's frame around it.
    """
    import tyro

    # Short forms of runtime flags, for example --max-hours for --runtime.max_hours.
    places = [name for name in ("runtime", "pretrain") if hasattr(default, name)]
    place = {"runtime": "runtime.", "pretrain": "pretrain.runtime."}[places[0]] if places else ""
    short = re.compile("--(max|dollars)[-_](hours|dollars|per[-_]hour)(?=$|=)")
    argv = [
        short.sub(lambda found: f"--{place}{found[0][2:].replace('-', '_')}", word) for word in argv
    ]
    if gone := next((word for word in argv if re.match(r"--([\w.]+\.)?scalar[-_]lr", word)), None):
        raise ConfigError(
            f"{gone} is no setting any more; the scalars have residual_lr, x0_lr and smear_lr, each the rate "
            "that is trained with (a hundredth of the old value)."
        )

    # tyro prints its own frame before it exits; it is shown only if no error of ours is behind it.
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                cls,
                args=argv,
                default=default,
                prog=f"primechat {verb}",
                use_underscores=True,
                description=f"{inspect.getdoc(cls) or ''}{notes}",
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as stop:
        cause: BaseException | None = stop
        while cause and not isinstance(cause, PrimechatError):
            cause = cause.__context__
        if cause:
            raise cause from None
        sys.stderr.write(said.getvalue())
        raise


def build_default(verb: str, cls: Any, argv: list[str], device: str | None) -> Any:
    """Return the config that the flags start from, and remove the shortcuts from the words."""
    if verb == "speedrun":
        from primechat.cli.cloud import full_run

        return cls(pretrain=full_run(argv))
    file = take_option(argv, "--config")
    config = read_config_file(Path(file), cls) if file else cls()
    if verb == "pretrain":
        depth, arch, recipe = take_shape(argv)
        if recipe and (file or arch):
            raise ConfigError(
                f"--recipe {recipe} sets all of a run, {'--config' if file else '--arch'} too; drop one."
            )
        if recipe:
            from primechat.cloud.plan import full_config

            config = full_config(depth, recipe)
        elif depth is not None or arch:
            config = shape_model(config, depth, arch)
    if device and hasattr(config, "runtime"):
        config = dataclasses.replace(
            config, runtime=dataclasses.replace(config.runtime, device=device)
        )
    return config


def read_config_file(path: Path, cls: type[Config]) -> Config:
    """Return a config read from a JSON file or from the folder of a run."""
    from primechat.config import decode_config
    from primechat.files.paths import parse_json

    path = resolve_path(path, "--config")
    path = path / "config.json" if path.is_dir() else path
    try:
        data = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"no JSON: {error!s:.80}"
        raise ConfigError(
            f"--config {path} must be a readable JSON file ({reason}); correct the path."
        ) from error
    if isinstance(data, dict) and data.get("class", cls.__name__) != cls.__name__:
        raise ConfigError(
            f"{path} holds a {data['class']}, it must hold a {cls.__name__}; use it with its own verb."
        )
    return decode_config(data, cls, str(path))


def take_shape(argv: list[str]) -> tuple[int | None, str | None, str | None]:
    """Remove --depth, --arch and --recipe from the words and return their values, None if absent."""
    depth, arch = take_option(argv, "--depth"), take_option(argv, "--arch")
    recipe = take_option(argv, "--recipe")
    if depth is not None and not depth.isdecimal():
        raise ConfigError(
            f"--depth {depth} must be a whole number from 1 to 256; try 4, or try 20 on GPUs."
        )
    if arch not in (None, "classic", "modern"):
        raise ConfigError(f"--arch {arch} must be classic or modern; try modern.")
    return None if depth is None else int(depth), arch, recipe


def shape_model(config: Any, depth: int | None, arch: str | None) -> Any:
    """Return a PretrainConfig with a model of this depth and architecture; vocabulary and context stay."""
    from primechat.config import GPTConfig

    model = config.model
    blocks = model.n_layer if depth is None else depth
    keep = dict(vocab_size=model.vocab_size, sequence_len=model.sequence_len)
    if (arch or model.architecture) == "classic":
        shape = GPTConfig.classic(blocks, **keep)
    else:
        shape = GPTConfig.modern(blocks, **keep, head_dim=model.head_dim)
    return dataclasses.replace(
        config, model=shape, tag=config.tag if depth is None else f"d{blocks}"
    )


def run_stage(verb: str, argv: list[str], device: str | None) -> int:
    """Parse a stage's flags, run it with a progress display, print its result and return the exit code."""
    name, config_name, _ = STAGES[verb]

    # Parse the flags.
    words, cls = list(argv), getattr(primechat, config_name)
    default = build_default(verb, cls, argv, device)
    short = SHORTCUTS if verb in ("pretrain", "speedrun") else ("--device", "--config")
    notes = "\n\n" + "\n".join(SHORTCUTS[key] for key in short)
    config = parse_flags(verb, cls, argv, default, notes)

    # Run the stage.
    result = call_stage(getattr(primechat, name), config)
    if os.environ.get("RANK", "0") != "0":
        return 0

    # Print the result, or the command that resumes a stopped run.
    if is_stopped(result):
        place = [] if device is None else ["--device", device]
        if isinstance(result, events.QuickstartResult) and not config.tag:
            place += ["--tag", find_tag(result.base.identifier)]
        again = ["primechat", verb, *words, *place, *([] if config.resume else ["--resume"])]
        print(f"Stopped and saved. To go on: {shlex.join(again)}")
    else:
        print(describe_result(result))
    return 0


def call_stage(function: Any, config: Any) -> Any:
    """Return the result of a stage run from the command line.

    Ctrl-C, SIGTERM and SIGHUP save and stop it; rank 0 displays its progress.
    """
    if os.environ.get("RANK", "0") != "0":
        with stop_on_signal() as stop:
            return function(config, stop=stop)
    from primechat.cli.progress import open_view

    with output.guard_streams(), open_view() as view, stop_on_signal(view.describe_stop) as stop:
        return function(config, on_event=view, stop=stop)


@contextlib.contextmanager
def stop_on_signal(
    describe: Callable[[], str] = lambda: "this step is finished and saved",
) -> Iterator[threading.Event]:
    """Yield an event that is set by the first Ctrl-C, SIGTERM or SIGHUP (the terminal was closed).

    A second Ctrl-C or SIGTERM ends the process at once. A second SIGHUP does not, because a closing terminal
    and its shell each send one. Under nohup, which ignores SIGHUP, it stays ignored.

    Args:
        describe: returns what a stop at this moment will finish and save.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    kinds = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        kinds.append(signal.SIGHUP)

    def ask_stop(number: int, frame: FrameType | None) -> None:
        stop.set()
        for kind in kinds:
            signal.signal(kind, signal.SIG_IGN if kind == signal.SIGHUP else signal.SIG_DFL)
        if os.environ.get("RANK", "0") != "0":
            return
        with contextlib.suppress(OSError):  # the terminal may be gone
            # A progress bar hides the cursor, and quitting at once would not bring it back.
            show_cursor = "\x1b[?25h" if os.isatty(2) else ""
            text = f"{show_cursor}\nStopping: {describe()}; Ctrl-C again quits at once.\n"
            os.write(2, text.encode())

    before = [signal.signal(kind, ask_stop) for kind in kinds]
    try:
        yield stop
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)


def find_tag(identifier: str) -> str:
    """Return the tag in an identifier: d4 in base/d4@600."""
    return identifier.partition("/")[2].partition("@")[0]


def is_stopped(result: object) -> bool:
    """Return whether a stage was stopped before its work was done."""
    if isinstance(result, events.QuickstartResult):
        return result.base.stopped or result.chat.stopped
    return isinstance(result, (events.TrainResult, events.AutochatResult)) and result.stopped


def describe_result(result: object) -> str:
    """Return a few lines on the result of a stage, and on what to do with it."""
    if isinstance(result, events.TokenizerResult):
        size = f"{result.vocab_size:,} tokens, {result.bytes_per_token:.2f} bytes a token"
        return f"Tokenizer: {size}, {result.elapsed_s:.1f} s; in {result.path}"
    if isinstance(result, events.EvaluateResult):
        scored = f"{result.scored_tokens:,} tokens, {result.scored_bytes:,} bytes, windows of {result.window}"
        measured = (
            f"{result.identifier} on {result.corpus}: {result.bpb:.4f} bits per byte ({scored})"
        )
        return "\n".join([measured, *(describe_overlap(result.overlap) if result.overlap else ())])
    if isinstance(result, events.TrainResult):
        measured = events.describe_bpb(result.val_bpb, result.val_tokens)
        quality = f"{result.n_params:,} parameters, {measured}"
        speed = f"{result.tokens:,} tokens at {result.tokens_per_s:,.0f} a second"
        return f"{result.identifier}: {quality}, {speed}; in {result.path}"
    if isinstance(result, events.AutochatResult):
        talks = f"{result.n_conversations} conversations of {result.turns} turns"
        speed = f"{result.tokens:,} tokens at {result.tokens_per_s:,.0f} a second"
        return f"{result.tag}: {talks}, {speed}; in {', '.join(result.generations)}"
    if isinstance(result, events.SpeedrunResult):
        parts = (result.base, result.chat, result.evaluation)
        return "\n".join(describe_result(part) for part in parts if part is not None)
    return (
        "\n".join(describe_quickstart(result))
        if isinstance(result, events.QuickstartResult)
        else ""
    )


def describe_overlap(overlap: events.OverlapResult) -> Iterator[str]:
    """Yield the lines that report what an evaluation text shares with a training text."""
    share = overlap.shared_n_grams / max(1, overlap.n_grams)
    yield (
        f"Contamination: {overlap.contaminated:,} of {overlap.documents:,} documents share a run of "
        f"{overlap.n} words with {overlap.training_texts:,} training conversations ({share:.2%} of all runs; "
        f"{overlap.too_short:,} documents are shorter)."
    )
    yield from (f"  shared: {text}" for text in overlap.examples)


def describe_quickstart(result: events.QuickstartResult) -> Iterator[str]:
    """Yield the closing lines of a quickstart: figures, a dialogue, and what to do next."""
    from primechat.cli.progress import clean_text

    yield "\n".join(
        ["", *(describe_result(part) for part in (result.tokenizer, result.base, result.chat)), ""]
    )
    for message in result.dialogue:
        yield f"  {'you' if message['role'] == 'user' else 'it':>4}  {clean_text(message['content'], 400)}"
    yield (
        "\nThe two figures in bits per byte are of different texts, chats as they are for the base model and "
        "marked-up conversations\nfor the chat model, so they say nothing about each other."
    )
    if result.base.step < FEW_STEPS:
        yield (
            f"Only {result.base.step} steps of training fitted into the time on this machine; words begin "
            f"after about {FEW_STEPS}.\nGive it more (--seconds 300), or talk to the model that ships."
        )
    chat, tag = result.chat.identifier, find_tag(result.base.identifier)
    steps = {
        f"primechat chat {chat}": "talk to it yourself",
        "primechat quickstart --seconds 600": "a better one: ten minutes of training",
    }
    if is_clone():  # an installed package has neither the labs nor the shipped model
        steps["primechat chat shipped/sft"] = "one that ships, trained for longer"
        steps["primechat lab 00"] = "the labs: look inside it"
    steps |= {
        f"primechat evaluate --model base/{tag}": "how well the base model predicts new text",
        "primechat pretrain --help": "every knob",
    }
    width = max(map(len, steps)) + 2
    yield f"\nIt took {result.total_s / 60:.1f} minutes. What to do next:"
    yield from (f"  {command:{width}}{meaning}" for command, meaning in steps.items())


if __name__ == "__main__":
    sys.exit(main())
