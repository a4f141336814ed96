"""The wall clock jumps by an hour, forwards and back, while answers are written: nobody is timed out."""

from __future__ import annotations

import shutil
import struct
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest

from tests.attack.test_faults import Reader
from tests.support.server import Server, chat_body, wait_for

SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static volatile long *seconds;

__attribute__((constructor)) static void open_offset(void) {
    int fd = open(getenv("CLOCK_OFFSET"), O_RDONLY);
    if (fd >= 0) {
        void *page = mmap(0, sizeof(long), PROT_READ, MAP_SHARED, fd, 0);
        if (page != MAP_FAILED) seconds = page;
        close(fd);
    }
}

int clock_gettime(clockid_t id, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int status = real(id, now);
    if (seconds && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) now->tv_sec += *seconds;
    return status;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec found;
    clock_gettime(CLOCK_REALTIME, &found);
    now->tv_sec = found.tv_sec;
    now->tv_usec = found.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *now) {
    struct timespec found;
    clock_gettime(CLOCK_REALTIME, &found);
    if (now) *now = found.tv_sec;
    return found.tv_sec;
}
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler here")
def test_the_clock_jumps_by_an_hour(tmp_path: Path) -> None:
    (tmp_path / "clock.c").write_text(SOURCE)
    library, offset = tmp_path / "clock.so", tmp_path / "offset"
    offset.write_bytes(bytes(8))
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(tmp_path / "clock.c"), "-ldl"]
    subprocess.run(command, check=True, timeout=60)

    def jump(seconds: int) -> None:
        with offset.open("r+b") as file:
            file.write(struct.pack("l", seconds))

    env = {"LD_PRELOAD": str(library), "CLOCK_OFFSET": str(offset)}
    flags = ("--engine-timeout-s", "20", "--header-timeout-s", "20", "--body-timeout-s", "20", "--send-timeout-s", "20")
    with Server(*flags, env=env) as server:
        body = chat_body("Tell me a story.", max_tokens=100, ignore_eos=True, temperature=0)
        expected = server.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
        for seconds in (3600, -3600):
            readers = [Reader(server, body) for _ in range(4)]
            for reader in readers:
                wait_for(partial(reader.has_read, 5), 20)
            jump(seconds)
            answer = server.chat(max_tokens=2, timeout=15)
            assert answer.status_code == 200, answer.text
            assert abs(answer.json()["created"] - time.time() - seconds) < 60, "it sees the clock jump"
            for reader in readers:
                reader.join(20)
                assert reader.found[-1] == "[DONE]" and '"error"' not in reader.found[-2]
                assert reader.text() == expected
        assert server.http.get("/health").status_code == 200
        assert "Traceback" not in server.log()
