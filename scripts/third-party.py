#!/usr/bin/env python3
"""The notices of the Rust crates that a build for TARGET holds, on standard output: third-party.py TARGET [CARGO OPTIONS].

Each crate that is compiled in (not what runs at build time) with version, licence expression and source, then every
licence, copying and notice file that the crates carry, equal texts once. cargo-about does more (it guesses missing texts over the network), which a package build must not need.
"""

import json
import pathlib
import subprocess
import sys

target, *options = sys.argv[1:]


def cargo(*arguments):
    return subprocess.run(["cargo", *arguments], check=True, capture_output=True, text=True).stdout


listed = cargo("tree", "--locked", "-e", "normal,no-proc-macro", "--target", target, "--prefix", "none", "--format", "{p}", *options)
used = {tuple(line.split()[:2]) for line in listed.splitlines() if line}
metadata = json.loads(cargo("metadata", "--locked", "--format-version", "1", "--filter-platform", target, *options))

texts = {}
print(f"Rust crates in /usr/bin/scansentry for {target}, and their notices.\n")
for package in sorted(metadata["packages"], key=lambda p: (p["name"], p["version"])):
    name, version = package["name"], package["version"]
    if (name, f"v{version}") not in used or name == "scansentry":
        continue
    used.discard((name, f"v{version}"))
    licence = package["license"] or f"see {package['license_file']}"
    source = package["repository"] or package["homepage"] or f"the package registry crates.io, {name}"
    print(f"{name} {version}: {licence}; {source}")
    folder = pathlib.Path(package["manifest_path"]).parent
    names = ("LICEN", "COPYING", "NOTICE", "UNLICENSE", "COPYRIGHT")
    files = [f for f in sorted(folder.iterdir()) if f.is_file() and f.name.upper().startswith(names)]
    for file in files:
        text = file.read_text(errors="replace").replace("\r\n", "\n").strip()
        texts.setdefault(text, []).append(f"{name} {version}")
    if not files:
        authors = ", ".join(package["authors"]) or "the authors at its source"
        print(f"    carries no licence text of its own; by {authors}")
missing = {name for name, _ in used} - {"scansentry"}
if missing:
    sys.exit(f"third-party: {', '.join(sorted(missing))}: not in cargo's metadata; no notices written")
for text, crates in texts.items():
    print(f"\n{'=' * 80}\n{', '.join(sorted(set(crates)))}\n{'-' * 80}\n{text}")
