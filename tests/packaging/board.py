#!/usr/bin/env python3
"""The arm64 package on a whole Debian 12 for arm64, in QEMU's software emulation: board.py chroot|boot FILE.deb

chroot  Unpacks the package into an arm64 root file system and runs `check`, `classify` and the daemon there (user-mode emulation).
boot    Boots a machine with systemd from the same root file system: installs the package, edits its configuration, exports slices, reads the
        results with mosquitto_sub, resets the machine without warning in the middle of a batch, and counts what arrived.

Needs root, debootstrap, binfmt-support, qemu-user-static, qemu-system-arm, openssh-client, e2fsprogs, mosquitto and its clients; installs
what is missing. The root file system is made once, in target/board (about five minutes). Nothing here is a real board.
"""

import collections
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "target/board"
ROOTFS = WORK / "rootfs"
PACKAGES = "debootstrap binfmt-support qemu-user-static qemu-system-arm openssh-client e2fsprogs mosquitto mosquitto-clients"
INSIDE = "systemd-sysv,udev,openssh-server,iproute2,ca-certificates,libstdc++6"
TOPIC = "scansentry/radiology/mri-1"
BATCH = 40
# For programs that run without a whole machine. See tests/it/emulated.rs for why not QEMU's default.
os.environ["QEMU_CPU"] = "cortex-a72"


def say(text: str) -> None:
    print(f"board: {text}", flush=True)


def fail(text: str) -> None:
    raise SystemExit(f"board: FAILED: {text}")


def run(*command, **options) -> subprocess.CompletedProcess:
    """Runs a command and returns its output; a failing one ends the test with its last lines."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    if done.returncode:
        fail(f"{' '.join(map(str, command))}: exit {done.returncode}\n{(done.stdout + done.stderr)[-2000:]}")
    return done


def until(what: str, condition, seconds: float = 600, pause: float = 0.5):
    """The first true answer of `condition`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(pause)
    fail(f"waited {seconds:.0f} s for {what}")


def prepare() -> None:
    """The tools, and the root file system."""
    if os.geteuid() != 0:
        fail("root is needed to make a root file system")
    run(ROOT / "scripts/setup.sh", "--packages", *PACKAGES.split())
    if not Path("/proc/sys/fs/binfmt_misc/status").exists():
        run("mount", "-t", "binfmt_misc", "binfmt_misc", "/proc/sys/fs/binfmt_misc")
    if not Path("/proc/sys/fs/binfmt_misc/qemu-aarch64").exists():
        run("update-binfmts", "--enable", "qemu-aarch64")
    if not (WORK / "ready").exists():
        say("making a Debian 12 for arm64")
        shutil.rmtree(ROOTFS, ignore_errors=True)
        WORK.mkdir(parents=True, exist_ok=True)
        run("debootstrap", "--arch=arm64", "--variant=minbase", f"--include={INSIDE}", "bookworm", ROOTFS)
        finish()
        (WORK / "ready").touch()


def finish() -> None:
    """What a board has beside the packages: a name, a network, a key to log in with."""
    key = WORK / "key"
    if not key.exists():
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
    home = ROOTFS / "root/.ssh"
    home.mkdir(mode=0o700, exist_ok=True)
    shutil.copy(f"{key}.pub", home / "authorized_keys")
    (ROOTFS / "etc/hostname").write_text("board\n")
    (ROOTFS / "etc/fstab").write_text("/dev/vda / ext4 errors=remount-ro 0 1\n")
    network = "[Match]\nName=e*\n[Network]\nDHCP=yes\n"
    (ROOTFS / "etc/systemd/network/20-wired.network").write_text(network)
    run("chroot", ROOTFS, "systemctl", "enable", "systemd-networkd", "ssh")
    # An initial RAM disk with what this machine has: with all modules it takes a quarter of an hour to make.
    tools = ROOTFS / "etc/initramfs-tools"
    (tools / "conf.d").mkdir(parents=True, exist_ok=True)
    (tools / "conf.d/board").write_text("MODULES=list\nCOMPRESS=gzip\n")
    (tools / "modules").write_text("virtio_pci\nvirtio_mmio\nvirtio_blk\nvirtio_net\nvirtio_rng\next4\n")
    quietly = "apt-get -y -qq --no-install-recommends -o Dpkg::Options::=--force-confold install linux-image-arm64 initramfs-tools"
    run("chroot", ROOTFS, "env", "DEBIAN_FRONTEND=noninteractive", "sh", "-c", f"apt-get update -qq && {quietly}")


class Broker:
    """A Mosquitto on this machine, and everything that arrives at it."""

    def __init__(self, folder: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        config = folder / "mosquitto.conf"
        config.write_text(f"listener {self.port} 127.0.0.1\nallow_anonymous true\npersistence false\n")
        mosquitto = shutil.which("mosquitto", path=os.environ["PATH"] + ":/usr/sbin")
        self.log = folder / "messages"
        self.process = subprocess.Popen([mosquitto, "-c", config], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(1)
        with self.log.open("wb") as out:
            command = ["mosquitto_sub", "-V", "5", "-p", str(self.port), "-q", "1", "-t", "scansentry/#", "-F", "%t\t%p"]
            self.subscriber = subprocess.Popen(command, stdout=out)

    def messages(self, kind: str) -> list[str]:
        lines = self.log.read_text(errors="replace").splitlines()
        return [line.split("\t", 1)[1] for line in lines if line.startswith(f"{TOPIC}/{kind}\t")]

    def results(self) -> list[dict]:
        return [json.loads(text) for text in self.messages("result")]

    def scans(self) -> int:
        return len({result["scan_id"] for result in self.results()})

    def stop(self) -> None:
        for process in (self.subscriber, self.process):
            process.kill()
            process.wait()


def configuration(port: int, host: str) -> str:
    return f'[watch]\nfolder = "/srv/scanner/export"\n[mqtt]\nurl = "mqtt://{host}:{port}"\n'


def in_chroot(deb: Path) -> None:
    """`check`, `classify` and `run` of the installed package, in the arm64 root file system."""
    root = WORK / "chroot"
    # What an earlier run that was killed left mounted here is this machine's own /dev.
    for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
        if (point := line.split()[4]).startswith(f"{root}/"):
            run("umount", "--lazy", point)
    if str(root) in Path("/proc/self/mountinfo").read_text():
        fail(f"{root}: something is mounted there; unmount it")
    if root.exists():
        shutil.rmtree(root)
    run("cp", "-a", "--reflink=auto", ROOTFS, root)
    with contextlib.ExitStack() as stack:
        for name in ("proc", "sys", "dev"):
            run("mount", "--bind", f"/{name}", root / name)
            stack.callback(run, "umount", "--lazy", root / name)
        shutil.copy(deb, root / "root/scansentry.deb")
        output = run("chroot", root, "apt-get", "install", "-y", "-qq", "/root/scansentry.deb").stdout
        if "not started yet" not in output:
            fail(f"the package does not say what to edit: {output}")
        broker = Broker(WORK)
        stack.callback(broker.stop)
        (root / "srv/scanner/export").mkdir(parents=True)
        (root / "etc/scansentry/conf.d").mkdir(exist_ok=True)
        (root / "etc/scansentry/conf.d/10-test.toml").write_text(configuration(broker.port, "127.0.0.1"))
        run("chroot", root, "scansentry", "simulate", "--to", "/srv/scanner/export", "--count", "10", "--rate", "100")
        run("chroot", root, "scansentry", "check")
        first = sorted((root / "srv/scanner/export").iterdir())[0].name
        line = json.loads(run("chroot", root, "scansentry", "classify", f"/srv/scanner/export/{first}").stdout)
        say(f"chroot: check passes, classify gives {line['decision']} ({line['probability']:.3f})")
        log = (WORK / "chroot-daemon.log").open("wb")
        daemon = subprocess.Popen(["chroot", root, "scansentry", "run"], stdout=log, stderr=log)
        stack.callback(daemon.kill)
        until("10 results", lambda: broker.scans() == 10)
        daemon.terminate()
        if daemon.wait(60) != 0:
            fail(f"the daemon ended with {daemon.returncode}")
    say("chroot: 10 images, 10 results")


class Machine:
    """A board of QEMU's kind `virt`, with the root file system on a disk of its own."""

    def __init__(self, disk: Path):
        self.disk = disk
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.process = None

    def boot(self) -> float:
        """Seconds until it answers."""
        start = time.monotonic()
        kernel = sorted(ROOTFS.glob("boot/vmlinuz-*"))[-1]
        initrd = sorted(ROOTFS.glob("boot/initrd.img-*"))[-1]
        console = (WORK / "console.log").open("ab")
        # 1 GB and a Cortex-A72: a Raspberry Pi 4's processor and half of its smallest memory.
        self.process = subprocess.Popen(
            ["qemu-system-aarch64", "-machine", "virt", "-cpu", "cortex-a72", "-smp", "2", "-m", "1024", "-accel", "tcg,thread=multi"]
            + ["-kernel", kernel, "-initrd", initrd, "-append", "root=/dev/vda rw console=ttyAMA0 quiet", "-nographic", "-no-reboot"]
            + ["-drive", f"file={self.disk},format=raw,if=virtio,cache=writeback"]
            + ["-netdev", f"user,id=n,hostfwd=tcp:127.0.0.1:{self.port}-:22", "-device", "virtio-net-pci,netdev=n,romfile="]
            + ["-device", "virtio-rng-pci"],
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=console,
        )
        until("the machine to answer", lambda: self.process.poll() is None and self.ssh("true", check=False) == "", 900, 2)
        return time.monotonic() - start

    def login(self, command: str, **options) -> subprocess.CompletedProcess:
        """Runs a shell command there."""
        settings = "StrictHostKeyChecking=no UserKnownHostsFile=/dev/null LogLevel=ERROR ConnectTimeout=20 BatchMode=yes".split()
        settings = [part for setting in settings for part in ("-o", setting)]
        ssh = ["ssh", *settings, "-i", WORK / "key", "-p", str(self.port), "root@127.0.0.1", command]
        return subprocess.run(ssh, capture_output=True, text=True, **options)

    def ssh(self, command: str, check: bool = True) -> str:
        """Runs a shell command there; its output."""
        done = self.login(command)
        if done.returncode and check:
            fail(f"{command}: exit {done.returncode}\n{(done.stdout + done.stderr)[-2000:]}")
        return done.stdout if done.returncode == 0 else f"exit {done.returncode}"

    def put(self, source: Path, target: str) -> None:
        with source.open("rb") as file:
            self.login(f"cat > {target}", stdin=file, check=True)

    def power_cut(self) -> None:
        """Without warning: what the kernel had not written is gone."""
        if self.process:
            self.process.kill()
            self.process.wait()


def booted(deb: Path) -> None:
    disk = WORK / "disk.img"
    disk.unlink(missing_ok=True)
    (WORK / "console.log").unlink(missing_ok=True)
    run("mke2fs", "-q", "-t", "ext4", "-d", ROOTFS, disk, "4G")
    broker, machine = Broker(WORK), Machine(disk)
    with contextlib.ExitStack() as stack:
        stack.callback(broker.stop)
        stack.callback(machine.power_cut)
        say(f"booted in {machine.boot():.0f} s")
        machine.put(deb, "/root/scansentry.deb")
        output = machine.ssh("apt-get install -y -qq /root/scansentry.deb 2>&1")
        if "not started yet" not in output:
            fail(f"the package does not say what to edit: {output}")
        config = WORK / "10-test.toml"
        config.write_text(configuration(broker.port, "10.0.2.2"))
        machine.ssh("install -d /etc/scansentry/conf.d")
        machine.put(config, "/etc/scansentry/conf.d/10-test.toml")
        machine.ssh("install -d /srv/scanner/export && systemctl start scansentry")
        if machine.ssh("systemctl is-active scansentry").strip() != "active":
            fail("the service is not active")
        slices = "scansentry simulate --to /srv/scanner/export --rate 100 --count {} --seed {} > /dev/null && sync"
        machine.ssh(slices.format(1, 1))
        until("the first result", lambda: broker.scans() == 1)
        exposure = machine.ssh("systemd-analyze security scansentry --no-pager | tail -n 1").strip()
        say(f"one image, one result; {exposure}")

        machine.ssh(slices.format(BATCH, 1000))
        until("the middle of the batch", lambda: broker.scans() >= 1 + BATCH // 3)
        before = broker.scans()
        machine.power_cut()
        if before >= 1 + BATCH:
            fail("the batch was over before the reset; raise BATCH")
        say(f"reset after {before} of {1 + BATCH} results; booted again in {machine.boot():.0f} s")
        until("the rest", lambda: broker.scans() == 1 + BATCH)
        machine.ssh(slices.format(1, 5000))
        until("one more", lambda: broker.scans() == 2 + BATCH)
        memory = machine.ssh("sed -n 's/^VmHWM:[[:space:]]*//p' /proc/$(systemctl show --value -p MainPID scansentry)/status").strip()
        status = json.loads(machine.ssh("scansentry status --json"))
        written = machine.ssh("du -sk /var/lib/scansentry | cut -f 1").strip()
        machine.ssh("systemctl stop scansentry")
        until("the last status", lambda: broker.messages("status")[-1] == "stopped")

    by_scan = collections.defaultdict(set)
    for text in broker.messages("result"):
        by_scan[json.loads(text)["scan_id"]].add(text)
    doubled = [scan for scan, texts in by_scan.items() if len(texts) > 1]
    if doubled:
        fail(f"{len(doubled)} scans have two different results")
    if "offline" not in broker.messages("status"):
        fail("the last will was not published")
    resent = len(broker.results()) - len(by_scan)
    replayed = sum(json.loads(next(iter(texts)))["replayed"] for texts in by_scan.values())
    say(f"{len(by_scan)} images, one result each, {resent} sent twice with the same event_id, {replayed} replayed; peak memory {memory}, state {written} kB")
    say(f"counts: {status['counts']}")


def main() -> None:
    if len(sys.argv) != 3 or sys.argv[1] not in ("chroot", "boot"):
        raise SystemExit(__doc__)
    deb = Path(sys.argv[2]).resolve()
    prepare()
    {"chroot": in_chroot, "boot": booted}[sys.argv[1]](deb)


if __name__ == "__main__":
    main()
