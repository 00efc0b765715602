"""Machines for the emulator's instances: the real programs, in namespaces of their own.

    with Machines(emulator, folder, key) as machines:
        subprocess.run([..., "scripts/aws/cloud.py", "launch"], env=machines.environment)
        machines.notice(instance_id, seconds=120)

While an instance runs in the emulator, a machine runs here: systemd as process 1, sshd, its volumes
as loop devices with ext4 on them, a metadata service on 169.254.169.254, and no network but that.
It has the file system of this computer, but its own /mnt, /run, home, /dev/disk and
/etc/systemd/system. When the instance is stopped the machine is gone, with all its processes; its
disks and its home are kept. Snapshots are copies of the disks. Needs root and the packages systemd
and openssh-server.
"""

import base64
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import boto3
from aws_emulator import Emulator
from conftest import REPOSITORY

DISK_BYTES = 2_000_000_000  # of each volume; sparse, so that only what is written takes room
POLL_S = 0.2
EBS = "nvme-Amazon_Elastic_Block_Store_"
INSTANCE_STORE = "nvme-Amazon_EC2_NVMe_Instance_Storage_AWS0"

# Process 1 of a machine before it becomes systemd.
BOOT = """
set -e
mount --make-rprivate /
ip link set lo up
ip address add 169.254.169.254/32 dev lo
mkdir -p /dev/disk
for folder in /run /mnt /dev/disk; do mount -t tmpfs tmpfs $folder; done
mkdir -p /run/sshd /dev/disk/by-id
mount --bind "$MACHINE/by-id" /dev/disk/by-id
mount -t cgroup2 none /sys/fs/cgroup
mount --bind "$MACHINE/units" /etc/systemd/system
mount --bind "$MACHINE/passwd" /etc/passwd
exec env -i container=other SYSTEMD_UNIT_PATH=/etc/systemd/system \
    /lib/systemd/systemd --system --unit=multi-user.target --log-target=console
"""

# A machine has sudo; where this computer lacks it, root does not need it.
SUDO = """#!/bin/bash
while [[ $1 == -* ]]; do shift; done
exec "$@"
"""

METADATA_UNIT = """
[Service]
ExecStart={python} {this} {machine}
Type=simple
"""

# At every start, as cloud-init does with what begins with #cloud-boothook.
USER_DATA_UNIT = """
[Service]
Type=oneshot
ExecStart=/bin/bash {machine}/user_data
ExecStart=/bin/bash -c "systemctl list-timers --all --no-pager > {machine}/user_data.log"
"""

TARGETS = "multi-user network-online sysinit basic shutdown poweroff umount final"


class Machines:
    """Machines for what runs in an emulator; a thread follows it."""

    def __init__(self, emulator: Emulator, folder: Path, key: Path, data: Path) -> None:
        """`key`: a private key, with its .pub beside it; `data`: what was downloaded before."""
        self.emulator, self.folder, self.key, self.data = emulator, folder, key, data
        self.ec2 = boto3.client(
            "ec2",
            region_name="us-east-1",
            endpoint_url=f"http://127.0.0.1:{emulator.port}",
            aws_access_key_id="machines",
            aws_secret_access_key="machines",
        )
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.loops: dict[str, str] = {}  # volume: loop device
        self.ended = threading.Event()
        self.trouble: Exception | None = None
        self.thread = threading.Thread(target=self._follow)
        (folder / "disks").mkdir(parents=True)
        self.environment = {
            **emulator.environment,
            "RESNET50_SSH_KEY": str(key),
            "RESNET50_SSH_USER": "root",
            "RESNET50_SSH_FROM": "203.0.113.7",
            "RESNET50_SSH_OPTIONS": f"-F {self._write_ssh_config()}",
        }

    def __enter__(self) -> "Machines":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()
        for instance_id in list(self.running):
            self._power_off(instance_id)
        for loop in self.loops.values():
            subprocess.run(["losetup", "--detach", loop], check=False)
        if self.trouble:
            raise self.trouble

    # ------------------------------------------------------------ for the tests

    def folder_of(self, instance_id: str) -> Path:
        """Where a machine's own files lie."""
        return self.folder / instance_id

    def notice(self, instance_id: str, seconds: float) -> None:
        """Let the metadata service say that EC2 stops the instance so soon."""
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + seconds))
        text = json.dumps({"action": "stop", "time": at})
        (self.folder_of(instance_id) / "notice").write_text(text)

    def run(self, instance_id: str, command: str) -> subprocess.CompletedProcess[str]:
        """Run a command in a machine."""
        return subprocess.run(
            [*self._enter(instance_id), "bash", "-c", command], capture_output=True, text=True
        )

    # ------------------------------------------------------------ following the emulator

    def _follow(self) -> None:
        while not self.ended.wait(POLL_S):
            try:
                self._step()
            except Exception as error:
                self.trouble = error
                raise

    def _step(self) -> None:
        for snapshot in self.ec2.describe_snapshots(OwnerIds=["self"])["Snapshots"]:
            self._make_disk(snapshot["SnapshotId"], snapshot["VolumeId"])
        attached: dict[str, set[str]] = {}
        for volume in self.ec2.describe_volumes()["Volumes"]:
            self._make_disk(volume["VolumeId"], volume.get("SnapshotId"))
            for place in volume["Attachments"]:
                attached.setdefault(place["InstanceId"], set()).add(volume["VolumeId"])
        groups = self.ec2.describe_instances()["Reservations"]
        for instance in (one for group in groups for one in group["Instances"]):
            instance_id, state = instance["InstanceId"], instance["State"]["Name"]
            if state == "running":
                self._show_disks(instance_id, attached.get(instance_id, set()))
                has_local_disk = instance["InstanceType"].startswith("g5.")
                self._boot(instance_id, instance["PublicIpAddress"], has_local_disk)
            elif state in ("stopped", "terminated"):
                self._power_off(instance_id)

    def _make_disk(self, name: str, source: str | None) -> None:
        path = self.folder / "disks" / name
        if path.exists():
            return
        original = self.folder / "disks" / (source or "")
        if source and original.is_file():
            subprocess.run(
                ["cp", "--sparse=always", original, path.with_suffix(".new")], check=True
            )
            path.with_suffix(".new").rename(path)
        else:
            path.touch()
            os.truncate(path, DISK_BYTES)

    def _show_disks(self, instance_id: str, volumes: set[str]) -> None:
        links = self.folder_of(instance_id) / "by-id"
        links.mkdir(parents=True, exist_ok=True)
        for volume in volumes:
            link = links / (EBS + volume.replace("-", "", 1))
            if not link.is_symlink():
                if volume not in self.loops:
                    self.loops[volume] = self._loop(self.folder / "disks" / volume)
                link.symlink_to(self.loops[volume])

    def _new_local_disk(self, here: Path) -> None:
        """The instance's own disk, which is empty after each stop."""
        disk = here / "local_disk"
        disk.unlink(missing_ok=True)
        disk.touch()
        os.truncate(disk, DISK_BYTES)
        link = here / "by-id" / INSTANCE_STORE
        if link.is_symlink():
            subprocess.run(["losetup", "--detach", link.readlink()], check=True)
            link.unlink()
        self.loops[str(disk)] = loop = self._loop(disk)
        link.symlink_to(loop)

    def _loop(self, disk: Path) -> str:
        made = subprocess.run(
            ["losetup", "--find", "--show", disk], check=True, capture_output=True, text=True
        )
        return made.stdout.strip()

    def _boot(self, instance_id: str, address: str, has_local_disk: bool) -> None:
        here = self.folder_of(instance_id)
        names = self.folder / "addresses"
        names.mkdir(exist_ok=True)
        # Only where it changed: a connection that is just being made must find the name.
        if not (names / address).is_symlink() or (names / address).readlink() != here:
            (names / address).unlink(missing_ok=True)
            (names / address).symlink_to(here)
        if instance_id in self.running:
            if self.running[instance_id].poll() is not None:
                raise RuntimeError(f"machine ended: {(here / 'console.log').read_text()}")
            return
        if not (here / "units").exists():
            self._install(here)
        if has_local_disk:
            self._new_local_disk(here)
        (here / "notice").unlink(missing_ok=True)
        command = (
            "unshare --pid --fork --kill-child --mount --mount-proc --cgroup --uts --ipc --net"
        )
        with open(here / "console.log", "a") as console:
            self.running[instance_id] = subprocess.Popen(
                [*command.split(), "bash", "-c", BOOT],
                env={**os.environ, "MACHINE": str(here)},
                stdin=subprocess.DEVNULL, stdout=console, stderr=console, start_new_session=True,
            )  # fmt: skip
        children = Path(
            f"/proc/{self.running[instance_id].pid}/task/{self.running[instance_id].pid}/children"
        )
        while not children.read_text().strip():
            time.sleep(0.01)
        (here / "pid").write_text(children.read_text().strip())

    def _install(self, here: Path) -> None:
        home, units, bin_folder = here / "home", here / "units", here / "bin"
        for folder in (
            home / ".ssh",
            home / "resnet50",
            units / "multi-user.target.wants",
            bin_folder,
        ):
            folder.mkdir(parents=True)
        (home / ".ssh" / "authorized_keys").write_text(self.key.with_suffix(".pub").read_text())
        # What setup.sh would install from the network.
        (home / "resnet50" / ".venv").symlink_to(REPOSITORY / ".venv")
        (home / "resnet50" / "data").symlink_to(self.data)
        for name in TARGETS.split():
            (units / f"{name}.target").write_text("[Unit]\nDefaultDependencies=no\n")
        (units / "metadata.service").write_text(
            METADATA_UNIT.format(python=sys.executable, this=Path(__file__).resolve(), machine=here)
        )
        found = self.ec2.describe_instance_attribute(InstanceId=here.name, Attribute="userData")
        user_data = base64.b64decode(found["UserData"].get("Value", ""))
        assert user_data.startswith(b"#cloud-boothook\n#!/bin/bash\n")
        (here / "user_data").write_bytes(user_data)
        (units / "user_data.service").write_text(USER_DATA_UNIT.format(machine=here))
        for name in ("metadata", "user_data"):
            wanted = units / "multi-user.target.wants" / f"{name}.service"
            wanted.symlink_to(f"../{name}.service")
        drop_in = units / "resnet50-trainer.service.d"
        drop_in.mkdir()
        (drop_in / "ec2.conf").write_text(
            "[Service]\nEnvironment=AWS_EC2_METADATA_SERVICE_ENDPOINT=http://169.254.169.254 "
            f"OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= PATH={bin_folder}:{os.environ['PATH']}\n"
        )
        if shutil.which("sudo") is None:
            (bin_folder / "sudo").write_text(SUDO)
            (bin_folder / "sudo").chmod(0o755)
        users = Path("/etc/passwd").read_text().splitlines()
        (here / "passwd").write_text(
            "".join(
                f"root:x:0:0:root:{home}:/bin/bash\n" if user.startswith("root:") else f"{user}\n"
                for user in users
            )
        )
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", here / "host_key"], check=True
        )
        environment = " ".join(
            f"{name}={value}"
            for name, value in {
                "PATH": f"{bin_folder}:/usr/sbin:/sbin:{os.environ['PATH']}",
                "SYSTEMD_UNIT_PATH": "/etc/systemd/system",
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",
            }.items()
        )
        (here / "sshd_config").write_text(
            f"HostKey {here}/host_key\nAuthorizedKeysFile {home}/.ssh/authorized_keys\n"
            f"StrictModes no\nUsePAM no\nPermitRootLogin yes\nPasswordAuthentication no\n"
            f"PidFile none\nSetEnv {environment}\n"
        )

    def _power_off(self, instance_id: str) -> None:
        process = self.running.pop(instance_id, None)
        if process is not None:
            # The child is process 1 of its namespace, and takes all the others with it.
            process.kill()
            process.wait()
            pid = (self.folder_of(instance_id) / "pid").read_text()
            while (
                Path(f"/proc/{pid}").exists()
                and "(zombie)" not in Path(f"/proc/{pid}/status").read_text()
            ):
                time.sleep(0.01)

    def _enter(self, instance_id: str) -> list[str]:
        pid = (self.folder_of(instance_id) / "pid").read_text()
        return [
            "nsenter",
            "--target",
            pid,
            "--mount",
            "--pid",
            "--net",
            "--cgroup",
            "--uts",
            "--ipc",
        ]

    def _write_ssh_config(self) -> Path:
        """ssh's way into a machine: an sshd of its own for each connection, on its input.

        As a real one, it is there once systemd is.
        """
        script = self.folder / "connect.sh"
        here = f"{self.folder}/addresses"
        script.write_text(
            f'#!/bin/bash\nmachine=$(readlink -e "{here}/$1") || exit 1\n'
            'exec nsenter --target "$(cat "$machine/pid")" --mount --pid --net --cgroup '
            "--uts --ipc bash -c 'until [ -S /run/systemd/private ]; do sleep 0.1; done; exec "
            '/usr/sbin/sshd -i -f "$0"\' "$machine/sshd_config"\n'
        )
        script.chmod(0o755)
        config = self.folder / "ssh_config"
        config.write_text(f"Host *\n  ProxyCommand {script} %h\n")
        return config


# ------------------------------------------------------------------------------ in a machine


class Metadata(http.server.BaseHTTPRequestHandler):
    """EC2's metadata service, version 2, as far as the trainer asks."""

    machine: Path

    def do_PUT(self) -> None:
        self._answer(b"token")

    def do_GET(self) -> None:
        notice = self.machine / "notice"
        if self.headers.get("X-aws-ec2-metadata-token") != "token":
            self.send_error(401)
        elif self.path == "/latest/meta-data/spot/instance-action" and notice.exists():
            self._answer(notice.read_bytes())
        else:
            self.send_error(404)

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


if __name__ == "__main__":
    Metadata.machine = Path(sys.argv[1])
    http.server.ThreadingHTTPServer(("169.254.169.254", 80), Metadata).serve_forever()
