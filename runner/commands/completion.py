"""Tab completion of `python -m runner` in bash, which Hydra's own script does not know.

    eval "$(python -m runner -sc install=bash)"

Names of groups, keys of config classes, their choices (each of several, a,b) and files are found
here, what is not, as hydra/launcher=, by Hydra; `python` and `python3` with other arguments
complete to files. `python -m runner.commands.completion WORD` prints what WORD may become.
"""

import sys
from collections.abc import Sequence
from glob import escape, glob
from pathlib import Path

_FILES = (".path", ".data", ".include", "root")  # ends of keys whose values are paths
_SCRIPT = r"""_espalier_runner() {
    local ours="^[^ ]*python[0-9.]* +-m +runner " line="${COMP_LINE:0:$COMP_POINT}" words
    [[ "$line" =~ $ours ]] || return
    local rest="${line:${#BASH_REMATCH[0]}}"
    words=$("${COMP_WORDS[0]}" -m runner.commands.completion "${rest##* }")
    if [[ -z "$words" ]]; then
        words=$(COMP_LINE="runner $rest" "${COMP_WORDS[0]}" -m runner -sc query=bash)
    fi
    COMPREPLY=($(compgen -W "$words" -- "${rest##* }"))
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o nospace -o default -o bashdefault -F _espalier_runner python python3
"""


def script_asked_for(arguments: Sequence[str]) -> str | None:
    """Return the script for bash if the arguments of `python -m runner` ask for it, else None."""
    asked = any(argument in ("-sc", "--shell-completion") for argument in arguments)
    return _SCRIPT if asked and "install=bash" in arguments else None


def continuations(word: str) -> list[str]:
    """Return what the beginning of an override may become: `key=` or `key=value`, sorted."""
    from runner.commands.keys import all_keys  # noqa: PLC0415

    key, sign, given = word.partition("=")
    marks, name = key[: len(key) - len(key.lstrip("+~"))], key.lstrip("+~")
    known: dict[str, list[str]] = {}
    for one, choices in all_keys():  # the classes of a group may share a key
        known.setdefault(one, []).extend(choices)
    if not sign:
        return sorted(f"{marks}{one}=" for one in known if one.startswith(name))
    before, comma, last = given.rpartition(",")
    values = [choice for choice in known.get(name, []) if choice.startswith(last)]
    if name.endswith(_FILES):
        values = [f"{p}/" if Path(p).is_dir() else p for p in glob(f"{escape(last)}*")]
    return sorted({f"{key}={before}{comma}{value}" for value in values})


if __name__ == "__main__":
    print(*continuations(sys.argv[1] if len(sys.argv) > 1 else ""), sep="\n")
