"""A newcomer with nothing but the documents finds each answer within a minute.

`python tests/test_questions.py` prints every question with the page of its answer and the seconds it takes to find it.
"""

from __future__ import annotations

import re

import pytest
from harness import ROOT
from newcomer import section

LIMIT_S = 60.0
SKIMMED_A_SECOND, READ_A_SECOND = 8.0, 4.0  # words: twice as many while one looks for a link as while one reads the answer
# Each question, the page and the heading of its answer, and words of the answer.
QUESTIONS = (
    ("What is it?", "README.md", "joborch", "a job server"),
    ("What do I need to install?", "operate.md", "Install", "Python 3.9"),
    ("How do I send my first job?", "README.md", "Quick start", "joborch.pyz submit"),
    ("Where is the Python example?", "README.md", "From Python", "from joborch import Jobs"),
    ("Which fields has an upload?", "use.md", "Fields of an upload", "`user_id`"),
    ("How large may an upload be?", "use.md", "Limits", "10 GiB"),
    ("How do I see why my job waits?", "use.md", "Why a job waits", "joborch why"),
    ("Why did my job fail?", "use.md", "When a job fails", "joborch why"),
    ("What does Unknown mean?", "README.md", "States", "lost contact"),
    ("How do I stop a job?", "use.md", "Stop a job", "/terminate/"),
    ("How do I get one file of a result?", "use.md", "Fetch results", "get 2 summary.txt"),
    ("How long is my result kept?", "use.md", "Limits", "48 hours"),
    ("Who may see my job?", "use.md", "Who sees my jobs", "operators"),
    ("What if the client dies?", "operate.md", "When things go wrong", "A client is killed"),
    ("How can my web site be called when a job ends?", "use.md", "Webhooks", "callback_url"),
    ("Which ports does it use?", "operate.md", "Ports", "5000"),
    ("Where is my data?", "operate.md", "Where the data is", "`DATA_PATH`"),
    ("How do I add a client?", "operate.md", "Add a client", "start a client there"),
    ("How do I drain a client?", "operate.md", "Take a machine out of use", "/drain"),
    ("How do I limit a user?", "operate.md", "Limit a user", "RUNS_PER_USER"),
    ("How do I replace a token?", "operate.md", "Replace a token", "OLD,NEW"),
    ("How do I move the server to another machine?", "operate.md", "Move the server", "Copy its whole"),
    ("How do I remove it?", "operate.md", "Move the server", "To remove joborch"),
    ("What happens when the disk is full?", "operate.md", "When the disk is full", "refuses uploads with 507"),
    ("What does the cause infrastructure mean?", "use.md", "When a job fails", "a machine was restarted"),
    ("What is logged?", "operate.md", "The log", "moves of a job"),
    ("How do I monitor it?", "operate.md", "Metrics", "`deploy/prometheus.yml`"),
    ("How do I see who stopped a job?", "operate.md", "Who did it", "terminated by"),
    ("How do I restore a backup?", "operate.md", "Backups", "joborch.pyz restore"),
    ("Which isolation do I need?", "security.md", "Scripts apart from each other", "Which one"),
    ("How do I run it as a service?", "operate.md", "Keep it running: systemd", "systemctl enable"),
    ("How do I put it behind nginx?", "operate.md", "Behind nginx, with TLS", "nginx.conf"),
    ("How do I upgrade?", "operate.md", "Upgrade", "replace `joborch.pyz`"),
    ("How do I back it up?", "operate.md", "Backups", "joborch.pyz backup"),
    ("How do I change a setting without a restart?", "operate.md", "Change settings while it runs", "SIGHUP"),
    ("How do I give somebody access?", "operate.md", "Tokens for callers", "token add"),
    ("How do I delete a user's data?", "operate.md", "Privacy", "delete-user"),
    ("What does a job cost?", "operate.md", "Sizing", "CPU for each job"),
    ("What does this problem of /health mean?", "operate.md", "What each problem means", "`client_gone`"),
    ("How do I use it with Slurm?", "hpc.md", "A login node that nobody can reach", "--executor slurm"),
    ("How do I use it with a cloud?", "clouds.md", "Clouds: clients that come and go", "creates virtual machines"),
    ("How do I use GPUs?", "operate.md", "GPUs", "CUDA_VISIBLE_DEVICES"),
    ("What does this setting do?", "reference.md", "Settings", "default"),
    ("What does this word mean?", "glossary.md", "Glossary", "attempt"),
)


def words(text: str) -> int:
    """How many words a reader sees: addresses of links and comments are not shown."""
    shown = re.sub(r"\]\([^)]*\)|<!--.*?-->|^\|[-| ]+$", "", text, flags=re.DOTALL | re.MULTILINE)
    return len(re.findall(r"\w[\w'./:-]*", shown))


def below(markdown: str, title: str) -> str:
    """The text below a heading of any rank."""
    found = re.search(rf"^#+ {re.escape(title)}\n(.*)", markdown, re.MULTILINE | re.DOTALL)
    assert found, f"there is no heading {title!r}"
    return found[1]


def before(text: str, what: str) -> str:
    """The text up to and with `what`."""
    assert what in text, f"{what!r} is not in {text[:200]!r}"
    return text[: text.index(what) + len(what)]


def seconds(page: str, title: str, answer: str) -> float:
    """How long a reader looks: from the top of the README to a link, from the top of that page to another, then reads the answer."""
    readme = (ROOT / "README.md").read_text()
    markdown, skimmed = readme, 0
    if page != "README.md":
        skimmed = words(before(readme, f"](docs/{page})"))
        markdown = (ROOT / "docs" / page).read_text()
    if not markdown.startswith(f"# {title}\n"):
        anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        skimmed += words(before(markdown, f"](#{anchor})"))
    return skimmed / SKIMMED_A_SECOND + words(before(below(markdown, title), answer)) / READ_A_SECOND


@pytest.mark.parametrize(("question", "page", "title", "answer"), QUESTIONS, ids=[question for question, *_ in QUESTIONS])
def test_it_is_found_within_a_minute(question: str, page: str, title: str, answer: str) -> None:
    assert question.endswith("?")
    assert seconds(page, title, answer) <= LIMIT_S


def test_an_answer_far_down_is_not_found() -> None:
    assert seconds("operate.md", "Install", "Is all well?") > LIMIT_S


def test_a_heading_that_is_gone_is_noticed() -> None:
    with pytest.raises(AssertionError, match="no heading"):
        below("# A\n", "B")
    assert section("## A\nb\n## C\n", "A") == "b\n"


if __name__ == "__main__":
    for question, page, title, answer in QUESTIONS:
        try:
            print(f"| {question} | {page}, {title} | {seconds(page, title, answer):.0f} s |")
        except AssertionError as error:
            print(f"| {question} | {page}, {title} | {error} |")
