"""Instructions that one picture takes on an ARM board, counted under QEMU: nearly the same figure each time, on however busy a machine.

    python3 benches/instructions/count.py [TRIPLE ...]

`classify` of many pictures less `classify` of one of them, by how many there were more; what loading costs does not count. Pictures:
generated slices, PNG, JPEG and DICOM. Programs: `make cross-aarch64`, `make cross-armv7`. Needs gcc and Debian's qemu-user (the static one
takes no plugins).
"""

import os
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
COUNT = pathlib.Path(__file__).with_name("count.c")
PICTURES = 21
# Not QEMU's processor `max`: see tests/it/emulated.rs.
EMULATORS = {
    "aarch64-unknown-linux-gnu": ["qemu-aarch64", "-cpu", "cortex-a72", "-L", "/usr/aarch64-linux-gnu"],
    "armv7-unknown-linux-gnueabihf": ["qemu-arm", "-cpu", "cortex-a7", "-L", "/usr/arm-linux-gnueabihf"],
}


def instructions(command, files):
    """How many `command` ran for `files`; all must have been classified."""
    with tempfile.NamedTemporaryFile("r") as log:
        # The plugin's line goes to the log.
        run = [command[0], "-d", "plugin", "-D", log.name, *command[1:], "classify", "--bundle", ROOT / "models/braintumor", *files]
        # Threads that wait for one another would count too, each time differently.
        environment = os.environ | {"SCANSENTRY__MODEL__THREADS": "1"}
        done = subprocess.run(run, capture_output=True, text=True, env=environment)
        if done.returncode or done.stdout.count('"error":null') != len(files):
            sys.exit(f"{command[-1]}: {len(files)} files were not classified (exit {done.returncode}): {done.stderr}")
        return int(re.search(r"instructions: (\d+)", log.read()).group(1))


def main():
    triples = sys.argv[1:] or list(EMULATORS)
    with tempfile.TemporaryDirectory() as scratch:
        plugin, slices = f"{scratch}/count.so", pathlib.Path(scratch, "slices")
        subprocess.run(["gcc", "-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror", "-o", plugin, COUNT], check=True)
        print("| | a picture, million instructions | the program's start and the model's check |\n|---|---|---|")
        for triple in triples:
            if triple not in EMULATORS:
                sys.exit(f"{triple}: not a target that is counted; one of {', '.join(EMULATORS)}")
            program = ROOT / "target" / triple / "stage/bin/scansentry"
            if not program.exists():
                sys.exit(f"{program}: is not there; run cross/build.sh {triple}")
            emulator, *options = EMULATORS[triple]
            if not slices.exists():
                simulate = ["simulate", "--to", slices, "--count", str(PICTURES), "--rate", "1000", "--seed", "1"]
                subprocess.run([emulator, *options, program, *simulate], check=True, capture_output=True)
            files = sorted(path for path in slices.rglob("*") if path.is_file())
            command = [emulator, "-plugin", plugin, *options, program]
            one, all_of_them = instructions(command, files[:1]), instructions(command, files)
            each = (all_of_them - one) / (len(files) - 1)
            print(f"| {triple} | {each / 1e6:.1f} | {(one - each) / 1e6:.1f} |")


if __name__ == "__main__":
    main()
