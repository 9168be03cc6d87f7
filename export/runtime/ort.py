"""onnxruntime, with its telemetry off. Import it from here, so that it is off before the library begins. No torch.

By itself (1.32, Linux) it keeps a device id and a queue of events under HOME, to be sent to its makers: processor,
paths, texts of errors. The call switches off what follows; only the variable, before the import, prevents the files.
"""

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnxruntime as onnxruntime  # noqa: TID251

onnxruntime.disable_telemetry_events()
