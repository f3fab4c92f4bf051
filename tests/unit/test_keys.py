"""Keys and passwords that people leave in a file that travels: found in comments and commands; no word is one."""

import re
from pathlib import Path

import pytest

from modeling.errors import UserError
from orchestrator.cli.main import main
from orchestrator.keys import given_key
from orchestrator.redaction import check_file, check_text

ROOT = Path(__file__).parents[2]
HEX = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize("text", [
    "# aws_secret_access_key: wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "# AWS_SECRET_ACCESS_KEY = 'wJalrXUtnFEMI/K7MDENG'",
    "#   password: correct-horse-battery-9",
    "# password: correct-horse-battery",
    "# Password: hunterhunter",
    "# token = 0123456789abcdef0123",
    "# db-password: 1234567890",
    "# {user: joe, passwd: 'hunter2hunter2'}",
    '# "api_key": "0123456789abcdef",',
    "# secret: 0123456789abcdef",
    "  - export wandb_api_key=0123456789abcdef",
    "  - export WANDB_API_KEY=anything",
    "  - DB_PASS=hunter22 ./run",
    "  - MYSQL_PASSWD=hunter22 ./run",
    f"  - wandb login {HEX}",
    f"  - wandb login --relogin '{HEX}'",
    "  - aws configure set aws_secret_access_key wJalrXUtnFEMIK7MDENG",
    "  - aws configure set profile.x.aws_secret_access_key wJalrXUtnFEMIK7MDENG",
    "  - curl -u joe:secret https://h/x",
    "  - curl -s -u 'joe:secret' https://h/x",
    "  - docker login -u joe -p hunter2 registry",
    "  - sshpass -p hunter2 ssh h",
    "  - curl -H 'X-Api-Key: 0123456789abcdef' h",
    "  - echo 'machine h login joe password hunter2' > ~/.netrc",
    "stages.a.x={token: 0123456789abcdef}",
])  # fmt: skip
def test_what_is_refused(text):
    with pytest.raises(UserError, match=r"^here: holds .* the file goes to the cluster as it is") as caught:
        check_text(text, "here")
    assert not re.search("wJalr|horse|hunter|0123|1234|anything|joe", str(caught.value))
    assert given_key(f"name: x\n{text}\nseed: 0\n"), "in the whole text, too"


@pytest.mark.parametrize("text", [
    "cluster: {secret: my-keys-of-2026}",
    "  secret: stageline-keys-2",
    "  # secret: stageline-keys",
    "cluster.secret=my-keys-2",
    "cluster={secret: my-keys-2}",
    "# token: ${WANDB_API_KEY}",
    "# token: $WANDB_API_KEY",
    "# token: <your token here>",
    "# token: ...",
    "# password: ********",
    "# token: WANDB_API_KEY",
    "# token: ~/.ray/auth_token",
    "# token: /run/secrets/token-1",
    "# password: environment of the nodes, not here",
    "# the token: Stageline's own",
    "# wandb_api_key: see docs",
    "# set token later",
    "# do not set password afterwards",
    "wandb_api_key_env: MY_WANDB_KEY_2",
    "token_file: secrets-of-mine-1.txt",
    "auth_token_path: mine-of-2026.txt",
    "max_tokens: 16384000",
    "eos_token: <|im_end|>",
    "  - export AWS_SECRET_ACCESS_KEY=$KEY",
    "  - export RAY_AUTH_TOKEN_PATH=~/.ray/token-of-head",
    '  - export TOKEN="$(cat /x)"',
    "  - wandb login",
    "  - docker login -u joe --password-stdin",
    "  - docker login -u joe -p $PASSWORD",
    "  - docker run -u 1000:1000 image",
    "  - docker run -u ubuntu:ubuntu image",
    "  - docker run -u $(id -u):$(id -g) image",
    "  - curl -u joe:$PASSWORD https://h",
    "  - ssh login@host -p 2222",
    "  - python -u -m stages.main",
])  # fmt: skip
def test_what_is_no_key(text):
    check_text(text, "here")


def test_our_own_experiments_and_those_of_the_documentation_hold_none():
    files = sorted((ROOT / "experiments").glob("*.yaml"))
    assert files
    for path in files:
        check_file(path)
    blocks = 0
    for page in [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]:
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
            assert not given_key(line), f"{page}:{number}"
        for block in re.findall(r"^```yaml[^\n]*\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
            check_text(block, str(page))
            blocks += 1
    assert blocks


@pytest.mark.parametrize("text", ["a-" * 50000, "set " * 20000, "login " * 20000, "token: " * 20000, "-u a:" * 20000])
def test_any_text_is_read_in_time(text):
    given_key(text)


@pytest.mark.parametrize("verb", [["submit"], ["cluster", "check"]])
@pytest.mark.parametrize("text, overrides, told", [
    ("# password: planted-in-a-comment-9\n", [], r"my\.yaml:\d+: holds what looks like a key or password"),
    ("", ["name=planted --token planted"], r"override 'name=\.\.\.': holds a key that a command is given"),
])  # fmt: skip
def test_nothing_is_sent_to_a_cluster(verb, text, overrides, told, tmp_path, monkeypatch, capsys):
    from orchestrator.cli import cluster_check, jobs
    from orchestrator.spec import load_spec

    def connected(address):
        raise AssertionError("asked before the file was looked through")

    path = tmp_path / "my.yaml"
    path.write_text((ROOT / "experiments" / "cluster_quickstart.yaml").read_text() + text)
    for module in (cluster_check, jobs):
        monkeypatch.setattr(module, "Jobs", connected)
        monkeypatch.setattr(module, "load_spec", lambda file, *_: load_spec(file, []))
    assert main([*verb, str(path), *overrides]) == 2
    out = "".join(capsys.readouterr())
    assert re.search(told, out) and "planted" not in out, out
