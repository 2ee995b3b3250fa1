"""Tab completion of `python -m runner` and of `espalier` in bash, zsh and fish.

    eval "$(espalier completion bash)"          # or zsh; fish: espalier completion fish | source

Names of groups, keys of config classes, their choices (each of several, a,b) and files are found
here; in bash what is not, as a group of somebody else's package, by Hydra. `python` and `python3`
with other arguments complete to files. `python -m runner.commands.completion WORD` prints what
WORD may become.
"""

import sys
from collections.abc import Sequence
from enum import StrEnum
from glob import escape, glob
from pathlib import Path

_FILES = (".path", ".data", ".include", "root")  # ends of keys whose values are paths
_FLAGS = ("-m", "-cd", "-cn", "--cfg", "--help")
_BASH = r"""_espalier_runner() {
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
_ZSH = r"""(( $+functions[compdef] )) || { autoload -Uz compinit && compinit; }
_espalier_runner() {
    if [[ "${words[2]} ${words[3]}" == "-m runner" ]]; then
        local -a found
        found=(${(f)"$(${words[1]} -m runner.commands.completion "${words[CURRENT]}")"})
        compadd -Q -S '' -- $found
    else
        _files
    fi
}
compdef _espalier_runner python python3
"""
_FISH = r"""function __espalier_runner
    set -l words (commandline -opc)
    test "$words[2..3]" = "-m runner"
end
function __espalier_runner_words
    set -l words (commandline -opc)
    $words[1] -m runner.commands.completion (commandline -ct)
end
complete -c python -c python3 -n __espalier_runner -f -a "(__espalier_runner_words)"
"""
SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


class Shell(StrEnum):
    """The shells that have a script."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


def script_asked_for(arguments: Sequence[str]) -> str | None:
    """Return the script of a shell if the arguments of `python -m runner` ask for it, else None."""
    if not {"-sc", "--shell-completion"}.intersection(arguments):
        return None
    asked = [shell for shell in SCRIPTS if f"install={shell}" in arguments]
    return SCRIPTS[asked[0]] if asked else None


def continuations(word: str) -> list[str]:
    """Return what the beginning of an override may become: `key=` or `key=value`, sorted."""
    key, sign, given = word.partition("=")
    marks, name = key[: len(key) - len(key.lstrip("+~"))], key.lstrip("+~")
    if word.startswith("-"):
        return sorted(flag for flag in _FLAGS if flag.startswith(word))
    if not sign:
        return sorted(f"{marks}{one}" for one in _beginnings(name) if one.startswith(name))
    before, comma, last = given.rpartition(",")
    values = [choice for choice in _choices(name) if choice.startswith(last)]
    if name.endswith(_FILES):
        values = [f"{p}/" if Path(p).is_dir() else p for p in glob(f"{escape(last)}*")]
    return sorted({f"{key}={before}{comma}{value}" for value in values})


def _beginnings(name: str) -> set[str]:
    """Return the groups, and the keys of the groups that `name` may be within."""
    from runner.commands.key_reference import WITHIN, blocks, groups  # noqa: PLC0415

    words = {f"{group}=" for group in groups() if group not in ("", *WITHIN)}
    for group, node in WITHIN.items():  # +model/adapter=, +model/part@model.parts.a=
        below, placeholder = node.rpartition(".")[::2]
        if node.startswith("NODE."):
            words.add(f"{group}@")
        else:
            words.add(f"{group}@{below}." if placeholder.isupper() else f"{group}=")
    words |= {key.path + "=" for block in blocks("") for key in block.keys}
    for group in [group for group in groups() if group and name]:
        node = WITHIN.get(group, group.replace("/", "."))
        here = _as_in(name, node)
        if here is not None:
            keys = (key.path for block in blocks(group) for key in block.keys)
            words |= {f"{here}{path.removeprefix(node)}=" for path in keys}
    return words


def _as_in(name: str, node: str) -> str | None:
    """Return the node that `name` is within, or may yet be, with its own word for a placeholder."""
    given, parts = name.split("."), node.split(".")
    for one, part in zip(given[:-1], parts, strict=False):
        if one != part and not part.isupper():
            return None
    if len(given) > len(parts):
        return ".".join(given[: len(parts)])
    known = parts[len(given) - 1]
    open_ended = any(part.isupper() for part in parts[len(given) - 1 :])
    return node if known.startswith(given[-1]) and not open_ended else None


def _choices(name: str) -> list[str]:
    """Return what the group or key `name` may be set to, empty where that is no choice."""
    from runner.commands.key_reference import WITHIN, blocks, groups, names_in  # noqa: PLC0415

    group = name.partition("@")[0]
    if group in groups():
        return names_in(group)
    found: list[str] = []
    for group in filter(None, groups()):
        node = WITHIN.get(group, group.replace("/", "."))
        here = _as_in(name, node)
        if here is None:
            continue
        for block in blocks(group):  # the classes of a group may share a key
            for key in block.keys:
                if f"{here}{key.path.removeprefix(node)}" == name:
                    found += key.choices
    return found


if __name__ == "__main__":
    print(*continuations(sys.argv[1] if len(sys.argv) > 1 else ""), sep="\n")
