"""What a build takes of a GPU's memory, with a made-up GPU."""

import json
from types import SimpleNamespace

from rdeploy import machine, nvml, worker

STATES = (1000, 1000, 1700, 1200)


def test_a_build_on_a_gpu_says_what_it_took_of_its_memory(tmp_path, fake, engine_job, monkeypatch):
    import rdeploy.backends

    monkeypatch.setattr(rdeploy.backends, "__path__", [*rdeploy.backends.__path__, str(tmp_path / "plugins")])
    used = iter(STATES)
    last = [0]

    def state():
        last[0] = next(used, last[0])
        return nvml.GpuState(memory_used_bytes=last[0])

    monkeypatch.setattr(machine, "gpu", lambda: SimpleNamespace(state=state, used_by_bytes=lambda pid: None))

    job = json.loads(json.dumps(engine_job(fake(sleep_s=0.0)), default=str))
    with_gpu = worker.run_job(job, directory=tmp_path)["engine"]
    monkeypatch.setattr(machine, "gpu", lambda: None)
    without = worker.run_job(job, directory=tmp_path)["engine"]

    # Whether the watch looked once or often, the highest that it saw is kept.
    assert with_gpu["build_device_peak_bytes"] in (700, 200)
    assert without["build_device_peak_bytes"] is None
