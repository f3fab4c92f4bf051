"""Keys and passwords as people leave them in files: assigned to a name, or given to a command.

Asked of what is to be written elsewhere as it is, so comments count as much as settings. What stands there is refused,
not taken out: a word of a sentence, a variable, a path or a placeholder is no key.
"""

import re

_PLACEHOLDER = r"(?![$<`{(\[]|\.\.\.|\*{3})"  # what begins like this stands for a value

# a name that is one of a secret, then what it is set to; `aws configure set NAME VALUE` has no sign between them
_ASSIGNED = re.compile(
    r"(?<![\w.-])(?P<set>set[ \t]+)?(?P<name>(?:[\w.-]*[_.-])?"
    r"(?:token|secrets?|password|passwd|credentials?|(?:api|access|private)[_-]?key))['\"]?"
    r"(?:[ \t]*[:=][ \t]*|(?(set)[ \t]+|(?!)))"
    rf"['\"]?{_PLACEHOLDER}(?P<value>[^\s'\"]{{8,}})(?P<last>['\",;)}}\]]*[ \t]*$)?",
    re.I | re.M,
)
_NO_VALUE = re.compile(
    r"(~|\.{1,2})?/[a-z.]"  # a path
    r"|[A-Z]+(_[A-Z]+)+$"  # the name of a variable
    r"|\w+://"  # an address: what it may hold is looked for elsewhere
)
_UNLIKE_A_WORD = re.compile(r"[\d+=~!@%^&*]")
_NAME_OF_A_SECRET = re.compile(r"[a-z0-9][a-z0-9.-]*$")  # of Kubernetes, as in `cluster: {secret: NAME}`

_COMMAND = re.compile(
    # a variable that is set to no other one, and is none that says where a key lies
    r"\b[A-Z0-9_]*(SECRET|TOKEN|PASSWORD|PASSWD|_PASS(?==)|API_KEY|ACCESS_KEY)[A-Z0-9_]*(?<!_ENV)(?<!_FILE)(?<!_PATH)=(?!['\"]?([$<\s]|\.\.\.))"
    # --password x
    r"|(?<![\w-])--([a-z]+-)*(token|password|passwd|secret|(api|access|secret)-?key)(=|\s+)(?!['\"]?([$<-]|\.\.\.))\S"
    # wandb login 0f0f…, docker login -p x, sshpass -p x
    r"|\blogin\b[^\n]{0,300}?(?<!\w)[0-9a-fA-F]{40}(?!\w)"
    rf"|\b(login\s[^\n]{{0,300}}?\s|sshpass\s+)-p[ =]?['\"]?{_PLACEHOLDER}[^\s'\"]"
    # a line of ~/.netrc
    rf"|\bmachine\s+\S+\s[^\n]{{0,300}}?\bpassword\s+['\"]?{_PLACEHOLDER}\S"
    # curl -u user:x; -u 1000:1000 is a user and a group
    rf"|(?<![\w-])-u[ \t=]+['\"]?(?P<user>[\w.@+-]+):(?!(?P=user)\b|\d+\b){_PLACEHOLDER}[^\s'\"]"
)


def given_key(text: str) -> str:
    """What of a key or password stands in a text, in words that do not repeat it; "" where there is none."""
    if _COMMAND.search(text):
        return "a key that a command is given"
    if any(_is_key(found) for found in _ASSIGNED.finditer(text)):
        return "what looks like a key or password"
    return ""


def _is_key(found: re.Match[str]) -> bool:
    value = found["value"].rstrip(".,;:)]}")
    if len(value) < 8 or _NO_VALUE.match(value):
        return False
    unlike_a_word = bool(_UNLIKE_A_WORD.search(value))
    if re.search(r"(^|\.)secret$", found["name"], re.I) and _NAME_OF_A_SECRET.match(value):
        line = found.string[found.string.rfind("\n", 0, found.start()) + 1 : found.start()]
        return unlike_a_word and "#" in line  # elsewhere the spec knows which setting it is
    # a word alone may be a password, one that a sentence goes on behind is none
    return unlike_a_word or (found["last"] is not None and not found["set"])
