# The image of a cluster's nodes: Ray, CUDA, and Stageline with all it needs. Build it in this folder, push it to where
# the nodes can pull it, and name it in the experiment (cluster.image):
#   docker build -t your-registry/stageline:0.1.0 .
# A model's weights may lie in it too: a second Dockerfile with FROM this image and COPY models /models.
ARG BASE=rayproject/ray:2.60.0-py311-gpu
FROM ${BASE}
WORKDIR /home/ray/stageline
COPY --chown=ray:users pyproject.toml constraints.txt README.md ./
COPY --chown=ray:users orchestrator orchestrator
COPY --chown=ray:users stages stages
COPY --chown=ray:users modeling modeling
COPY --chown=ray:users cluster cluster
# In the order of the Makefile: DeepSpeed is built without isolation, so that it sees this torch and pulls no other.
RUN pip install --no-cache-dir -c constraints.txt setuptools wheel packaging ninja py-cpuinfo psutil numpy pydantic \
 && pip install --no-cache-dir -c constraints.txt torch \
 && DS_BUILD_OPS=0 pip install --no-cache-dir -c constraints.txt --no-build-isolation deepspeed \
 && pip install --no-cache-dir -c constraints.txt --no-build-isolation ".[tracking]"
WORKDIR /home/ray
