# Trains in a container. NVIDIA's PyTorch images bring torch, NCCL and apex with its kernels; 24.12 is from before Volta was dropped:
#   docker build -t vip .                                                                                   V100 to H200
#   docker build -t vip --build-arg BASE=nvcr.io/nvidia/pytorch:25.12-py3 --build-arg KERNELS=sm_100 .      to Blackwell
#   docker run --gpus all --ipc=host --stop-timeout 120 --user "$(id -u):$(id -g)" -v /data/imagenet:/data:ro \
#     -v "$PWD/runs:/runs" vip train.py model=vip_m7 data.root=/data runs_dir=/runs
ARG BASE=nvcr.io/nvidia/pytorch:24.12-py3
FROM ${BASE}

# What torch must have been compiled for; the build ends with one line where it was not.
ARG KERNELS=sm_70
WORKDIR /opt/vip
COPY . .
RUN KERNELS="${KERNELS}" scripts/docker/install.sh

# Names for whoever has no entry in /etc/passwd; what is written goes to mounted folders, and caches to /tmp.
ENV HOME=/tmp USER=vip PYTHON=python3
USER 1000:1000
ENTRYPOINT ["/opt/vip/scripts/launch.sh"]
CMD ["train.py", "--help"]
