"""Which configuration a packed product is launched with: a tuned one of its shape, if there is one, else the rule's.

packed.json has both, and files of bqnn.autotune have more tuned ones. A tuned configuration is for launches that agree
in all of :class:`Launch`: other shapes and other cards take the rule, which knows rows and precision alone.
"""

import json
import os
import re
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from bqnn.container import FormatError

TABLE = Path(__file__).with_name("packed.json")
VERSION = 1
ENVIRONMENT = "BQNN_CONFIGS"


class Launch(NamedTuple):
    """What a configuration is chosen by; rows, channels and columns are rounded up to powers of two."""

    op: str  # "packed_linear" or "packed_conv2d"
    architecture: str  # "sm_90"; "interpreter" without a GPU
    precision: str
    bits: int  # of a code
    codebooks: str  # "tensor" or "channel"
    x_bytes: int  # of an activation as the kernel loads it
    rows: int  # or output pixels
    channels: int  # of a group
    columns: int


OPS, PRECISIONS, CODEBOOKS = ("packed_linear", "packed_conv2d"), ("fp32", "bf16", "int8"), ("tensor", "channel")


def _power_of_two(low, high):
    return lambda value: type(value) is int and low <= value <= high and value & (value - 1) == 0


def _one_of(*values):
    return lambda value: any(type(value) is type(each) and value == each for each in values)


def _is_time(value):
    return type(value) in (int, float) and 0 < value < float("inf")


LAUNCH_FIELDS = {
    "op": _one_of(*OPS),
    "architecture": lambda value: type(value) is str and bool(re.fullmatch(r"sm_[0-9]{2,3}|interpreter", value)),
    "precision": _one_of(*PRECISIONS),
    "bits": _one_of(1, 2, 4),
    "codebooks": _one_of(*CODEBOOKS),
    "x_bytes": _one_of(1, 2, 4),
    "rows": _power_of_two(1, 2**62),
    "channels": _power_of_two(1, 2**62),
    "columns": _power_of_two(1, 2**62),
}
TILE_FIELDS = {"BM": _power_of_two(16, 256), "BN": _power_of_two(16, 256), "BW": _power_of_two(16, 256)}
# By the name of the kernel. A GEMV has a row of its own for each row of x; a product may be cut into parts.
CONFIG_FIELDS = {
    "gemv": {"BN": _power_of_two(1, 2048), "BW": _power_of_two(16, 2048), "num_warps": _one_of(1, 2, 4, 8)},
    "product": {
        **TILE_FIELDS,
        "UNROLLED": _one_of(False, True),
        "num_warps": _one_of(1, 2, 4, 8),
        "num_stages": _one_of(1, 2, 3, 4, 5, 6),
        "most_splits": _one_of(1, 2, 4, 8),
    },
}


def _check_fields(where, value, fields, optional=()):
    if not isinstance(value, dict):
        raise FormatError(f"{where} must be an object, got {value!r:.80}")
    for name in (*fields, *value):
        if name not in fields and name not in optional:
            raise FormatError(f"{where} has the unknown field {name!r:.80}")
        if name not in value:
            raise FormatError(f"{where} has no {name!r}")
        if not {**fields, **dict.fromkeys(optional, _is_time)}[name](value[name]):
            raise FormatError(f"{where}: {name} can not be {value[name]!r:.80}")


def _tuned_entry(where, entry):
    """The launch and the configuration of one entry of "tuned"; raises FormatError where it is none."""
    _check_fields(where, entry, {**LAUNCH_FIELDS, "config": lambda value: True}, ("seconds", "default_seconds"))
    config = entry["config"]
    kernel = config.get("kernel") if isinstance(config, dict) else None
    if not isinstance(kernel, str) or kernel not in CONFIG_FIELDS:
        raise FormatError(f"{where}: config must have a kernel, one of {', '.join(CONFIG_FIELDS)}, got {config!r:.80}")
    _check_fields(f"{where}: config", config, {"kernel": _one_of(kernel), **CONFIG_FIELDS[kernel]})
    if kernel == "gemv" and entry["op"] != "packed_linear":
        raise FormatError(f"{where}: config: kernel can not be 'gemv' for {entry['op']}")
    if kernel == "product" and entry["precision"] == "int8" and config["BW"] < 32:
        raise FormatError(f"{where}: config: BW must be 32 or more for 'int8', got {config['BW']}")
    return Launch(*(entry[name] for name in Launch._fields)), config


def parse(text):
    """The tuned configurations of a file, by launch; raises FormatError that says what is wrong with which entry."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise FormatError(f"this is no JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("tuned"), list):
        raise FormatError(f"a list 'tuned' is needed, got {content!r:.80}")
    if content.get("version") != VERSION:
        raise FormatError(f"version must be {VERSION}, got {content.get('version')!r:.80}")
    if unknown := set(content) - {"version", "tuned"}:
        raise FormatError(f"the unknown field {min(unknown)!r:.80}")
    tuned = {}
    for index, entry in enumerate(content["tuned"]):
        launch, config = _tuned_entry(f"tuned[{index}]", entry)
        if launch in tuned:
            raise FormatError(f"tuned[{index}] is for the same launches as an entry before it")
        tuned[launch] = config
    return tuned


def read(path):
    """As :func:`parse`, of a file, whose path the message of a FormatError begins with."""
    try:
        return parse(Path(path).read_bytes().decode("utf-8"))
    except FormatError as error:
        raise FormatError(f"{os.fspath(path)}: {error}") from error
    except UnicodeDecodeError as error:
        raise FormatError(f"{os.fspath(path)}: this is no JSON: {error}") from error


class Trial:
    """The launches of a while, and what was compiled for them."""

    def __init__(self, launch, config):
        self.forced = {} if config is None else {launch: config}
        self.launches = []
        self.kernels = []


class _State:
    """What this process knows; files are read when the first product is launched."""

    table = None
    tuned = None
    trial = None


def _load():
    if _State.table is None:
        table = json.loads(TABLE.read_text())
        shipped = parse(json.dumps({name: table[name] for name in ("version", "tuned")}))
        path = os.environ.get(ENVIRONMENT)
        _State.tuned = {**shipped, **(read(path) if path else {})}
        _State.table = table


def rule(precision):
    """Tiles by rows: the first whose BM is not below them, else the last. BW words are BW columns of each product."""
    _load()
    return _State.table["rule"][precision]


def candidates(precision):
    """The tiles that bqnn.autotune tries, the rule's first."""
    return [*rule(precision), *_State.table["candidates"][precision]]


def install(tuned):
    """Tuned configurations, by launch, take the place of those that there are for the same launches."""
    _load()
    _State.tuned = {**_State.tuned, **tuned}


def launch_of(op, architecture, precision, flags, x, rows, channels, columns):
    """The launch of a packed product with ``flags_of_packed``; ``x`` as the kernel loads it."""
    return Launch(
        op,
        f"sm_{architecture}" if architecture else "interpreter",
        precision,
        flags["BITS"],
        CODEBOOKS[flags["PER_CHANNEL"]],
        x.element_size(),
        *(1 << (size - 1).bit_length() for size in (rows, channels, columns)),
    )


def find(make_launch):
    """The tuned configuration of ``make_launch()``, or None. Mostly there are none, and then no launch is made."""
    _load()
    trial = _State.trial
    if trial is not None:
        launch = make_launch()
        trial.launches.append(launch)
        return trial.forced.get(launch)
    return _State.tuned.get(make_launch()) if _State.tuned else None


def compiled(kernel):
    """Takes down what a launch returned; the interpreter returns nothing."""
    if _State.trial is not None and kernel is not None:
        _State.trial.kernels.append(kernel)


@contextmanager
def trial(launch=None, config=None):
    """A while in which ``launch`` takes ``config`` and every other launch what the rule says; gives a Trial."""
    before = _State.trial
    _State.trial = Trial(launch, config)
    try:
        yield _State.trial
    finally:
        _State.trial = before
