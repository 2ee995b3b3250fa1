"""Tab completion of `python -m runner` in bash, which Hydra's own script does not know.

    eval "$(python -m runner -sc install=bash)"

Hydra still finds the words; `python` and `python3` with other arguments complete to files.
"""

from collections.abc import Sequence

_SCRIPT = r"""_espalier_runner() {
    local ours="^[^ ]*python[0-9.]* +-m +runner " line="${COMP_LINE:0:$COMP_POINT}" words
    [[ "$line" =~ $ours ]] || return
    local rest="${line:${#BASH_REMATCH[0]}}"
    words=$(COMP_LINE="runner $rest" "${COMP_WORDS[0]}" -m runner -sc query=bash)
    COMPREPLY=($(compgen -W "$words" -- "${rest##* }"))
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o nospace -o default -o bashdefault -F _espalier_runner python python3
"""


def script_asked_for(arguments: Sequence[str]) -> str | None:
    """Return the script for bash if the arguments of `python -m runner` ask for it, else None."""
    asked = any(argument in ("-sc", "--shell-completion") for argument in arguments)
    return _SCRIPT if asked and "install=bash" in arguments else None
