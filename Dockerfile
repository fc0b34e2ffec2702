# A CUDA image for serving: vLLM's own image with the plugin in it.
#
#   docker build -t vllm-easyspec .
#   docker run --gpus all --ipc=host -p 8000:8000 vllm-easyspec TARGET --tensor-parallel-size 8 \
#       --speculative-config NAME   # of a file in configs/, such as llama-3.3-70b-with-3.2-1b
#
# The version that the tests run on; it has to lie in pyproject.toml's range, or pip would replace the image's vLLM.
FROM vllm/vllm-openai:v0.32.0

COPY . /vllm-easyspec
# Built against the image's own setuptools and torch. --break-system-packages: the image's Python belongs to it alone.
RUN uv pip install --system --break-system-packages --no-cache --no-build-isolation /vllm-easyspec

ENTRYPOINT ["vllm", "serve"]
