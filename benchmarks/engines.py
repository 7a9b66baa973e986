"""Our bundles and the engines a user would pick instead, on the same checkpoint, in one run and taking turns.

    python scripts/make_real_size_checkpoint.py --output /tmp/real/mobilevlm-1.7b
    alignkd-export /tmp/real/mobilevlm-1.7b --target onnx --int4 --output /tmp/real/onnx-int4
    python benchmarks/engines.py --checkpoint /tmp/real/mobilevlm-1.7b --bundles /tmp/real/onnx-int4 \
        --cache /tmp/engines --output /tmp/engines/table

llama.cpp, OpenVINO, onnxruntime-genai and MNN are installed into environments below --cache and the checkpoint is
converted by their own tools, once. A peer that cannot be had is one line of the report.
"""

from engines.command import main

if __name__ == "__main__":
    main()
