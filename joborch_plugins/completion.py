"""The command `completion`: prints what a shell loads. At each TAB that calls `completion -- WORDS`, which prints what fits."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Sequence

from joborch_plugins.caller import ENDED, JobsError
from joborch_plugins.commands import ALIASES, DONE, FLAGS, STATUSES, WORDS, Given, age_text, flags_of, printable

TAB_LIMIT_S = 2  # a server that does not answer gives no words
MOST_IDS = 50

# Each calls the program by the name that was typed, and completes file names if nothing fits.
SCRIPTS = {
    "bash": r"""_joborch() {
    mapfile -t COMPREPLY < <("${COMP_WORDS[0]/#\~/$HOME}" completion -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null | cut -f1)
}
complete -o default -F _joborch joborch joborch.pyz
""",
    "zsh": r"""#compdef joborch joborch.pyz
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
_joborch() {
    local -a found
    found=("${(@f)$(${~words[1]} completion -- "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    found=("${(@)${(@)found//:/\\:}/$'\t'/:}")
    if [[ -n $found ]]; then _describe -V joborch found; else _files; fi
}
compdef _joborch joborch joborch.pyz
""",
    "fish": r"""function __joborch
    set -l words (commandline -opc) (commandline -ct)
    set -l program (string replace -r '^~' $HOME -- $words[1])
    set -l found ($program completion -- $words[2..] 2>/dev/null)
    if test (count $found) -gt 0
        printf '%s\n' $found
    else
        __fish_complete_path (commandline -ct)
    end
end
complete -c joborch -fka '(__joborch)'
complete -c joborch.pyz -fka '(__joborch)'
""",
}


def run_completion(given: Given) -> int:
    """Print the script of a shell, or the words that fit the last one, each with what it means."""
    options = given.options
    if options.shell:
        print(json.dumps(SCRIPTS[options.shell]) if options.json else SCRIPTS[options.shell], end="\n" if options.json else "")
        return DONE
    if not options.script:
        raise JobsError("name the shell: bash, zsh or fish")
    signal.signal(signal.SIGALRM, lambda *_: os._exit(DONE))
    signal.alarm(TAB_LIMIT_S)
    found = [(word, said) for word, said in candidates(given, options.script) if word.startswith(options.script[-1].strip("="))]
    if options.json:
        print(json.dumps(found))
    for word, said in [] if options.json else found:
        given.screen.say(f"{word}\t{printable(said)}")
    return DONE


def candidates(given: Given, words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield what the last word may be, and what that means. Raises JobsError."""
    before, last = [word for word in words[:-1] if word != "="], words[-1]  # bash makes three words of --status=Failed
    if not before:
        yield from ((name, word.help) for name, word in WORDS.items())
        return
    name = ALIASES.get(before[0], before[0])
    if name not in FLAGS or "--" in before:
        yield from ((mode, f"of a {mode}") for mode in ("server", "client") if name in ("config", "doctor"))
        return
    typed = dict(zip(before, before[1:]))
    given.options.server = typed.get("--server")
    given.options.user = int(typed["--user"]) if typed.get("--user", "").isdecimal() else None
    known = {each: how for names, how in flags_of(name) for each in names if each.startswith("-")}
    if before[-1] in known and known[before[-1]].get("action") != "store_true":
        yield from values(given, before[-1], last)
    elif last.startswith("-"):
        yield from ((flag, how["help"]) for flag, how in known.items())
    elif FLAGS[name] and FLAGS[name][0][0][0] in ("jobs", "words"):
        yield from ids(given, {"cancel": False, "wait": False, "retry": True}.get(name))


def values(given: Given, flag: str, last: str) -> Iterator[tuple[str, str]]:
    """Yield what may follow a flag."""
    listed = last.rpartition(",")[0]
    first = listed + "," if listed else ""
    if flag in ("-s", "--service"):
        yield from ((service["name"], service["policy"]) for service in given.jobs.server.ask("GET", "/services")["services"])
    elif flag == "--status":
        yield from ((first + status, "") for status in STATUSES)
    elif flag in ("--after", "--from"):
        yield from ((first + word, said) for word, said in ids(given, None))


def ids(given: Given, ended: bool | None) -> Iterator[tuple[str, str]]:
    """Yield the user's jobs, newest first: all, or those that have ended or not."""
    for job in given.jobs.list(limit=MOST_IDS):
        if ended is None or (job.status in ENDED) is ended:
            yield str(job.id), f"{job.facts['name'] or job.facts['service']} {job.status} {age_text(job.facts)}"
