"""`make audit`: does a vulnerability service know of anything in what is installed here?

    python tests/audit.py           # STAGELINE_OSV_URL: another service than OSV's own, with its protocol

Invariant: "no vulnerabilities" is said only of packages that the service has answered for. Where it cannot be reached
that is the one line, with exit code 0: a machine without the web can still work. Known vulnerabilities are exit code 1,
but for those in IGNORED, each with its reason.
"""

import json
import os
import subprocess
import sys

import requests

OSV_URL = "https://api.osv.dev/v1/query"
REACH_S = 10
IGNORED: dict[str, str] = {}  # id -> why it does not touch us


def main(ignored: dict[str, str] = IGNORED) -> int:
    url = os.environ.get("STAGELINE_OSV_URL", OSV_URL)
    if absent := _unreachable(url):
        print(f"audit: not done, {url} cannot be reached ({absent})")
        return 0
    command = [sys.executable, "-m", "pip_audit", "--vulnerability-service", "osv", "--osv-url", url]
    command += ["--skip-editable", "--progress-spinner", "off", "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        found = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        print(f"audit: broke off:\n{done.stderr}")
        return 1
    for one in (one for one in found if "skip_reason" in one and one["name"] != "stageline"):
        print(f"audit: not audited: {one['name']}: {one['skip_reason']}")
    known = [(one, its) for one in found for its in one.get("vulns", ())]
    for one, its in known:
        names = {its["id"], *its["aliases"]}
        reason = next((ignored[name] for name in names if name in ignored), "")
        fixed = f", fixed in {', '.join(its['fix_versions'])}" if its["fix_versions"] else ""
        told = f"ignored: {reason}" if reason else its["description"][:120]
        print(f"audit: {one['name']} {one['version']}: {', '.join(sorted(names))}{fixed}: {told}")
    open_ones = [its for _, its in known if ignored.keys().isdisjoint({its["id"], *its["aliases"]})]
    audited = sum("skip_reason" not in one for one in found)
    print(f"audit: {audited} packages, {len(open_ones)} open vulnerabilities, {len(known) - len(open_ones)} ignored")
    return 1 if open_ones else 0


def _unreachable(url: str) -> str:
    """Why the service gives no answer; "" where it does."""
    try:
        answer = requests.post(
            url, json={"package": {"name": "pip", "ecosystem": "PyPI"}, "version": "9.0"}, timeout=REACH_S
        )
        answer.raise_for_status()
        answer.json()
    except requests.RequestException as error:  # a body that is no JSON too
        return type(error).__name__
    return ""


if __name__ == "__main__":
    sys.exit(main())
