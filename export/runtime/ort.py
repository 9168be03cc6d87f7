"""onnxruntime, with its telemetry off. Import it from here, so that it is off before the library begins. No torch.

By itself (1.32, Linux) it keeps a device id and a queue of events under HOME, to be sent to its makers: processor,
paths, texts of errors. The call switches off what follows; only the variable, before the import, prevents the files.
"""

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnxruntime as onnxruntime  # noqa: TID251

onnxruntime.disable_telemetry_events()


EXACT = ("session.x64quantprecision", "1")  # part of the keys of caches


def session_options(threads: int) -> onnxruntime.SessionOptions:
    """Return what every session has: threads, no warnings (of its own memory planning), exact products of 8 bits.

    On x86 processors without VNNI instructions onnxruntime adds pairs of such products in 16 bits, which can saturate:
    of random weights and inputs by a tenth of the largest output. With the last option it does not, at about the same
    speed; other processors have no use for it.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    options.add_session_config_entry(*EXACT)
    return options
