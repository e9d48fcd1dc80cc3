"""tests/test_k8s.py: the manifests, without a cluster. Run by `make test`.

Needs Python 3 and PyYAML, and skips, saying so, without them. What a server would refuse is refused
here by shapes: strict, and no larger than these manifests are, so that whoever adds a field adds it
there, too. Then comes what no server sees: names that must exist elsewhere, JSON and YAML inside of
strings, flags, variables that belong to one release of NCCL's plugin. That the checks see anything
is itself checked: each of many spoiled manifests must be found out. Where kubectl is installed, it
applies the folder to a server that is made here. test_group.py goes on from there.
"""
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading

os.chdir(os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
R1 = os.path.abspath(os.environ.get("R1", "./r1"))
counts = {"passed": 0, "failed": 0, "skipped": 0}


def check(ok, what):
    counts["passed" if ok else "failed"] += 1
    if not ok:
        print("FAILED:", what)
    return ok


def skip(why):
    counts["skipped"] += 1
    print("skipped:", why)


def finish():
    print("{passed} passed, {failed} failed, {skipped} skipped".format(**counts))
    sys.exit(counts["failed"] > 0)


def run(*argv):
    """A command's end, in an environment without make's variables and without a cluster."""
    with tempfile.TemporaryDirectory() as home:
        env = {"PATH": os.environ["PATH"], "HOME": home, "KUBECONFIG": "/dev/null"}
        return subprocess.run(argv, capture_output=True, text=True, env=env)


try:
    import yaml
except ImportError:
    skip("test_k8s needs PyYAML (pip install pyyaml)")
    finish()

# ---------------------------------------------------------------------- what may stand where

TEXTS = {str: str}
CONTAINER = {
    "name!": str, "image!": str, "command": [str], "args": [str], "restartPolicy": str,
    "env": [{"name!": str, "value": str,
             "valueFrom": {"secretKeyRef!": {"name!": str, "key!": str, "optional": bool}}}],
    "envFrom": [{"configMapRef!": {"name!": str}}],
    "ports": [{"name!": str, "containerPort!": int}],
    "readinessProbe": {"httpGet!": {"path!": str, "port!": str}, "initialDelaySeconds": int,
                       "periodSeconds": int, "timeoutSeconds": int},
    "resources": {"requests": {str: (str, int)}, "limits": {str: (str, int)}},
    "securityContext": {"privileged": bool, "capabilities": {"add!": [str]},
                        "allowPrivilegeEscalation": bool, "readOnlyRootFilesystem": bool,
                        "runAsNonRoot": bool, "runAsUser": int},
    "volumeMounts": [{"name!": str, "mountPath!": str}]}
POD = {
    "nodeSelector": TEXTS, "tolerations": [{"key!": str, "operator!": str}],
    "terminationGracePeriodSeconds": int, "initContainers": [CONTAINER], "containers!": [CONTAINER],
    "volumes": [{"name!": str, "hostPath": {"path!": str},
                 "emptyDir": {"medium": str, "sizeLimit": str}, "configMap": {"name!": str},
                 "csi": {"driver!": str, "volumeAttributes!": TEXTS}}]}
TEMPLATE = {"metadata!": {"labels!": TEXTS, "annotations": TEXTS}, "spec!": POD}
PORT = {"name!": str, "port!": int, "targetPort!": str}
GROUP = {"size!": int, "restartPolicy!": str, "workerTemplate!": TEMPLATE}
KINDS = {
    "ConfigMap": ("v1", {"data!": TEXTS}),
    "Service": ("v1", {"spec!": {"selector!": TEXTS, "ports!": [PORT]}}),
    "Deployment": ("apps/v1", {
        "spec!": {"selector!": {"matchLabels!": TEXTS}, "template!": TEMPLATE}}),
    "LeaderWorkerSet": ("leaderworkerset.x-k8s.io/v1", {
        "spec!": {"replicas!": int, "leaderWorkerTemplate!": GROUP}})}


def shape_problems(value, shape, where):
    """How a value differs from a shape: a type, [shape of the items], {key: shape}; ! is a must."""
    if isinstance(shape, dict) and str in shape:
        shape = {key: shape[str] for key in value} if isinstance(value, dict) else shape
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            yield f"{where}: want a mapping, got {value!r}"
            return
        known = {key.rstrip("!"): inner for key, inner in shape.items()}
        yield from (f"{where}: no {key[:-1]}" for key in shape
                    if key[-1:] == "!" and key[:-1] not in value)
        for key, inner in value.items():
            if key in known:
                yield from shape_problems(inner, known[key], f"{where}/{key}")
            else:
                yield f"{where}: unknown field {key}"
    elif isinstance(shape, list):
        for i, item in enumerate(value if isinstance(value, list) else [value]):
            yield from shape_problems(item, shape[0], f"{where}/{i}")
        if not isinstance(value, list):
            yield f"{where}: want a list, got {value!r}"
    elif not isinstance(value, shape) or isinstance(value, bool) != (shape is bool):
        yield f"{where}: got {value!r}, want {shape}"


class Strict(yaml.SafeLoader):
    """A key that is given twice is an error, as it is for the API server."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        if len(set(keys)) < len(keys):
            raise yaml.YAMLError(f"a key stands twice among {keys}")
        return super().construct_mapping(node, deep)


def parse(text):
    return list(yaml.load_all(text, Strict))


# ---------------------------------------------------------------------- a pod, seen by its kubelet

def config_maps(objects):
    return {o["metadata"]["name"]: o["data"] for o in objects if o["kind"] == "ConfigMap"}


def environment(container, maps, given=()):
    """A container's variables: the given ones, its ConfigMaps', its own, which may name others."""
    env = dict(given)
    for source in container.get("envFrom", []):
        env.update(maps[source["configMapRef"]["name"]])
    for e in container.get("env", []):
        env[e["name"]] = expand(e.get("value", ""), env)
    return env


def expand(word, env):
    """$(NAME) as the kubelet replaces it; a name that is unknown stays as it is."""
    return re.sub(r"\$\(([A-Za-z_]\w*)\)", lambda m: env.get(m[1], m[0]), word)


def argv_of(container, env):
    return [expand(w, env) for w in container.get("command", []) + container.get("args", [])]


def flags_of(words):
    return dict(zip(words[::2], words[1::2]))


def mounts(container):
    return {m["mountPath"]: m["name"] for m in container.get("volumeMounts", [])}


def containers_of(template):
    return template["spec"].get("initContainers", []) + template["spec"]["containers"]


LWS_ENV = {"LWS_LEADER_ADDRESS": "localhost", "LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "0"}


def pod_problems(template, maps, known_flags, lws):
    """What holds for each of our pods, on GPUs or not."""
    spec, notes = template["spec"], template["metadata"].get("annotations", {})
    everyone, volumes = containers_of(template), [v["name"] for v in spec.get("volumes", [])]
    mounted = [name for c in everyone for name in mounts(c).values()]
    for names in [c["name"] for c in everyone
                  ], volumes, *([m["mountPath"] for m in c.get("volumeMounts", [])]
                                for c in everyone):
        if len(set(names)) < len(names):
            yield f"a name stands twice: {names}"
    for name in [c["name"] for c in everyone] + volumes:
        if not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", name):
            yield f"{name} is no DNS label"
    if set(mounted) != set(volumes):
        yield f"volumes and mounts differ: {set(mounted) ^ set(volumes)}"
    for v in spec.get("volumes", []):
        if len(v) != 2:
            yield f"volume {v['name']}: want one source"
        if "configMap" in v and v["configMap"]["name"] not in maps:
            yield f"volume {v['name']}: no ConfigMap {v['configMap']['name']}"
    for c in everyone:
        if not re.search(r":[\w.-]+$", c["image"]):
            yield f"image {c['image']} has no tag"
        for word in argv_of(c, environment(c, maps, LWS_ENV if lws else {})):
            if "$(" in word and "\n" not in word:
                yield f"{c['name']}: {word} names no variable"
        for e in c.get("env", []):
            if ("value" in e) == ("valueFrom" in e):
                yield f"{c['name']}: {e['name']}: want a value or a secret"
        resources = c.get("resources", {})
        gpus = [resources.get(k, {}).get("nvidia.com/gpu") for k in ("requests", "limits")]
        if gpus != ([8, 8] if c["name"] == "r1" and lws else [None, None]):
            yield f"{c['name']} has GPUs {gpus}"
        if "--" in " ".join(c.get("args", [])) and c["name"] != "r1":
            yield f"{c['name']}: only r1 has args"
    if [c["name"] for c in spec["containers"]] != ["r1"]:
        yield "want one container, r1"
    r1 = spec["containers"][0]
    flags = flags_of(r1["args"])
    if r1["command"] != ["/r1", "serve"]:
        yield f"r1 is not process 1, but {r1['command']}"
    yield from (f"r1 serve --help doesn't know {f}" for f in flags if f not in known_flags)
    if (flags.get("--host"), flags.get("--port")) != ("0.0.0.0", "30000"):
        yield "want --host 0.0.0.0 and --port 30000"
    if r1["ports"] != [{"name": "http", "containerPort": 30000}]:
        yield f"ports: {r1['ports']}"
    if r1["readinessProbe"]["httpGet"] != {"path": "/health", "port": "http"}:
        yield "want a readinessProbe that asks /health"
    if lws and notes.get("kubectl.kubernetes.io/default-container") != "r1":
        yield "the default container is not r1"


def group_problems(lws, maps):
    """What holds for R1 on GPUs, on one node or two."""
    group = lws["spec"]["leaderWorkerTemplate"]
    template = group["workerTemplate"]
    spec = template["spec"]
    inits, r1 = spec["initContainers"], spec["containers"][0]
    flags = flags_of(r1["args"])
    if lws["metadata"]["name"] != "r1" or lws["spec"]["replicas"] != 1:
        yield "want one group, r1"
    if group["restartPolicy"] != "RecreateGroupOnPodRestart":
        yield f"restartPolicy {group['restartPolicy']}"
    if flags["--tp"] != str(8 * group["size"]):
        yield f"--tp {flags['--tp']} on {group['size']} nodes"
    if {t["key"]: t["operator"] for t in spec["tolerations"]} != {
            "nvidia.com/gpu": "Exists", "cloud.google.com/impending-node-termination": "Exists"}:
        yield f"tolerations {spec['tolerations']}"
    if "cloud.google.com/gke-accelerator" not in spec["nodeSelector"]:
        yield "no nodeSelector for the GPUs"
    if spec["terminationGracePeriodSeconds"] < 60:
        yield "answers are given less than a minute to end"
    shm = [v for v in spec["volumes"] if v["name"] == mounts(r1).get("/dev/shm")]
    if not shm or shm[0]["emptyDir"] != {"medium": "Memory", "sizeLimit": "250Gi"}:
        yield "/dev/shm is not memory"
    driver = [v for v in spec["volumes"] if v["name"] == mounts(r1).get("/usr/local/nvidia")]
    if not driver or driver[0]["hostPath"]["path"] != "/home/kubernetes/bin/nvidia":
        yield "r1 has no driver's libraries"
    if "/usr/local/nvidia/lib64" not in environment(r1, maps).get("LD_LIBRARY_PATH", "").split(":"):
        yield "LD_LIBRARY_PATH lacks the driver's"

    fetch = inits[0]
    env = environment(fetch, maps)
    if fetch["name"] != "fetch" or fetch["image"] != r1["image"]:
        yield "fetch, in r1's image, is not the first"
    script = fetch["command"][1]
    if mounts(fetch).get(os.path.dirname(script)) != "fetch" or "fetch.sh" not in maps["r1-fetch"]:
        yield f"fetch: nothing is at {script}"
    if env["MODEL_DIR"] != flags["--model-path"]:
        yield f"fetched to {env['MODEL_DIR']}, served from {flags['--model-path']}"
    if not re.fullmatch(r"[0-9a-f]{40}", env["MODEL_REVISION"]):
        yield "want a commit"
    home = "/" + env["MODEL_DIR"].split("/")[1]
    if not mounts(fetch).get(home) or mounts(fetch)[home] != mounts(r1).get(home):
        yield f"fetch and r1 see different volumes at {home}"
    token = [e.get("valueFrom") for e in fetch["env"] if e["name"] == "HF_TOKEN"]
    if token != [{"secretKeyRef": {"name": "hf-secret", "key": "hf_api_token", "optional": True}}]:
        yield f"HF_TOKEN is {token}"

    notes = template["metadata"]["annotations"]
    buckets = [v["csi"] for v in spec["volumes"] if "csi" in v]
    limits = {f"gke-gcsfuse/{k}-limit": "0" for k in ("cpu", "memory", "ephemeral-storage")}
    wanted = {"gke-gcsfuse/volumes": "true", **limits} if buckets else {}
    if {k: v for k, v in notes.items() if k.startswith("gke-gcsfuse/")} != wanted:
        yield "a bucket's volume and annotations need each other"
    for b in buckets:
        if b["driver"] != "gcsfuse.csi.storage.gke.io" or "bucketName" not in b["volumeAttributes"]:
            yield f"bucket {b}"
        if "/gcs" not in mounts(r1) or "/gcs" not in mounts(fetch):
            yield "the bucket is not at /gcs"
    if bool(buckets) != env.get("MODEL_STAGE", "").startswith("/gcs/"):
        yield "the bucket and MODEL_STAGE need each other"


# NCCL's plugin: what each release's variables are, the daemon, and the two command lines.
PLUGIN = "/usr/local/nccl-plugin/lib64"
COMMON = dict(item.split("=", 1) for item in f"""
LD_LIBRARY_PATH={PLUGIN}:/usr/local/nvidia/lib64 NCCL_LIB_DIR={PLUGIN}
CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7 NCCL_FASTRAK_LLCM_DEVICE_DIRECTORY=/dev/aperture_devices
NCCL_SOCKET_IFNAME=eth0 NCCL_FASTRAK_CTRL_DEV=eth0
NCCL_FASTRAK_IFNAME=eth1,eth2,eth3,eth4,eth5,eth6,eth7,eth8 NCCL_CROSS_NIC=0
NCCL_MIN_NCHANNELS=4 NCCL_P2P_NET_CHUNKSIZE=524288 NCCL_P2P_PCI_CHUNKSIZE=524288
NCCL_P2P_NVL_CHUNKSIZE=1048576 NCCL_BUFFSIZE=8388608 NCCL_NET_GDR_LEVEL=PIX
NCCL_FASTRAK_NUM_FLOWS=2 NCCL_FASTRAK_USE_SNAP=1 NCCL_FASTRAK_USE_LLCM=1
NCCL_FASTRAK_ENABLE_CONTROL_CHANNEL=0 NCCL_FASTRAK_ENABLE_HOTPATH_LOGGING=0
NCCL_FASTRAK_PLUGIN_ACCEPT_TIMEOUT_MS=600000 NCCL_TUNER_PLUGIN=libnccl-tuner.so
NCCL_ALGO=Ring,Tree NCCL_PROTO=Simple NCCL_NVLS_ENABLE=0""".split())
RELEASES = {
    "v1.0.8-1": ("v1.0.14", "install --install-nccl --nccl-buildtype 223",
                 ["--num_hops=2", "--num_nics=8", "--uid=", "--alsologtostderr"], "", {
                     "NCCL_DYNAMIC_CHUNK_SIZE": "524288",
                     "NCCL_P2P_PXN_LEVEL": "0",
                     "NCCL_DEBUG": "INFO",
                     "NCCL_DEBUG_SUBSYS": "INIT,GRAPH,ENV,TUNING,NET"
                 }),
    "v1.0.15": ("v1.0.21", "install --install-nccl", ["--num_hops=2"], "_simple", {
        "NCCL_DEBUG": "WARN",
        "NCCL_DEBUG_SUBSYS": "INIT,NET,ENV,COLL,GRAPH"
    })
}
DEVICES = [f"/dev/nvidia{i}" for i in range(8)] + [
    "/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/dmabuf_import_helper"]
REPOSITORY = "us-docker.pkg.dev/gce-ai-infra/gpudirect-tcpxo/"


def transport_problems(lws, maps):
    """What two nodes need in addition: networks, devices, plugin, daemon, and their variables."""
    template = lws["spec"]["leaderWorkerTemplate"]["workerTemplate"]
    spec, notes = template["spec"], template["metadata"]["annotations"]
    r1 = spec["containers"][0]
    flags = flags_of(r1["args"])
    for name, value in {"--nnodes": "$(LWS_GROUP_SIZE)", "--node-rank": "$(LWS_WORKER_INDEX)",
                        "--dist-init-addr": "$(LWS_LEADER_ADDRESS):6002"}.items():
        if flags.get(name) != value:
            yield f"{name} is {flags.get(name)}"
    networks = json.loads(notes["networking.gke.io/interfaces"])
    if [n["interfaceName"] for n in networks] != [f"eth{i}" for i in range(9)]:
        yield f"interfaces {networks}"
    if len({n["network"]
            for n in networks}) != 9 or notes["networking.gke.io/default-interface"] != "eth0":
        yield "a network stands twice, or the default is not eth0"
    devices = parse(notes["devices.gke.io/container.tcpxo-daemon"])[0]
    if devices != [{"path": d} for d in DEVICES]:
        yield f"devices {devices}"
    if [c["name"]
            for c in spec["initContainers"]] != ["fetch", "nccl-plugin-installer", "tcpxo-daemon"]:
        yield "the init containers are others, or in another order"
    installer, daemon = spec["initContainers"][1:]
    release = installer["image"].removeprefix(REPOSITORY + "nccl-plugin-gpudirecttcpx-dev:")
    version, install, argv, suffix, env = RELEASES[release]
    if daemon["image"] != REPOSITORY + "tcpgpudmarxd-dev:" + version:
        yield f"plugin {release} with {daemon['image']}"
    if installer["command"][:2] != ["bash", "-ec"] or installer["command"][2].split("\n") != [
            "bash /scripts/container_entry.sh " + install,
            "cp -R /var/lib/tcpxo/. /usr/local/nccl-plugin", ""
    ]:
        yield f"the installer runs {installer['command']}"
    if daemon["command"] != ["bash", "/fts/entrypoint_rxdm_container.sh", *argv]:
        yield f"the daemon runs {daemon['command']}"
    if daemon.get("restartPolicy") != "Always":
        yield "the daemon is no sidecar"
    if set(daemon["securityContext"]["capabilities"]["add"]) != {"NET_ADMIN", "NET_BIND_SERVICE"}:
        yield "the daemon's capabilities"
    if environment(daemon, maps) != {"LD_LIBRARY_PATH": "/usr/local/nvidia/lib64"}:
        yield "the daemon's environment"
    if set(mounts(daemon)) != {"/usr/local/nvidia", "/hostsysfs", "/hostprocsysfs"}:
        yield f"the daemon's mounts {mounts(daemon)}"
    if mounts(installer) != {"/usr/local/nccl-plugin": mounts(r1).get("/usr/local/nccl-plugin")}:
        yield "r1 doesn't see what was installed"
    files = {name: f"{PLUGIN}/a3plus_{what}_config{suffix}.textproto" for name, what in (
        ("NCCL_TUNER_CONFIG_PATH", "tuner"),
        ("NCCL_SHIMNET_GUEST_CONFIG_CHECKER_CONFIG_FILE", "guest"))}
    for name, value in sorted({**COMMON, **env, **files}.items() ^ environment(r1, maps).items()):
        yield f"plugin {release}: {name}={value} is missing, or too many"
    paths = {v["name"]: v.get("hostPath", {}).get("path") for v in spec["volumes"]}
    for c, at, host in ((daemon, "/hostsysfs", "/sys"), (daemon, "/hostprocsysfs", "/proc/sys"),
                        (daemon, "/usr/local/nvidia", "/home/kubernetes/bin/nvidia"),
                        (r1, "/dev/aperture_devices", "/dev/aperture_devices"),
                        (r1, "/ssd", "/mnt/stateful_partition/kube-ephemeral-ssd")):
        if paths.get(mounts(c).get(at)) != host:
            yield f"{c['name']}: {at} is not the node's {host}"
    if not r1["securityContext"]["privileged"]:
        yield "r1 can't open the aperture devices"


def service_problems(service, template, lws):
    """The Service finds the pods that answer, and none else."""
    labels = dict(template["metadata"]["labels"])
    if lws:
        labels = {"leaderworkerset.sigs.k8s.io/name": "r1",
                  "leaderworkerset.sigs.k8s.io/worker-index": "0"}
    if service["spec"]["selector"] != labels:
        yield f"the selector is {service['spec']['selector']}, want {labels}"
    if service["metadata"]["name"] != ("r1-svc" if lws else "r1-tiny"):
        yield f"the Service is called {service['metadata']['name']}"
    if service["spec"]["ports"] != [{"name": "http", "port": 30000, "targetPort": "http"}]:
        yield f"ports {service['spec']['ports']}"


def problems(files, known_flags):
    """Everything that is wrong with what `kubectl apply` would send of {name: text}."""
    objects, found = [], []
    try:
        for name, text in files.items():
            if not text.startswith("---\n"):
                found.append(f"{name}: doesn't begin with ---")
            for o in parse(text):
                version, shape = KINDS.get(o["kind"], ("none: this kind has no place here", {}))
                if o["apiVersion"] != version:
                    found.append(f"{name}: apiVersion {o['apiVersion']}, want {version}")
                body = {k: v for k, v in o.items() if k not in ("apiVersion", "kind")}
                shape = {"metadata!": {"name!": str}, **shape}
                found += shape_problems(body, shape, f"{name}: {o['kind']}")
                objects.append(o)
        if found:
            return found
        maps = config_maps(objects)
        kinds = {o["kind"]: o for o in objects}
        lws = kinds.get("LeaderWorkerSet")
        template = lws["spec"]["leaderWorkerTemplate"]["workerTemplate"] if lws \
            else kinds["Deployment"]["spec"]["template"]
        found += pod_problems(template, maps, known_flags, lws)
        found += service_problems(kinds["Service"], template, lws)
        if lws:
            found += group_problems(lws, maps)
        if lws and lws["spec"]["leaderWorkerTemplate"]["size"] > 1:
            found += transport_problems(lws, maps)
        elif not lws:
            selector = kinds["Deployment"]["spec"]["selector"]
            if selector != {"matchLabels": template["metadata"]["labels"]}:
                found.append("the Deployment doesn't find its own pods")
    except (yaml.YAMLError, KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        found.append(f"{type(error).__name__}: {error}")
    return found


def read(path):
    with open(path, encoding="utf-8") as f:
        return f.read()


def sent(folder):
    """What `kubectl apply -f folder` sends: files of three endings, of the folder itself."""
    return {name: read(f"{folder}/{name}") for name in sorted(os.listdir(folder))
            if name.endswith((".yaml", ".yml", ".json"))}


# Each of these must be found: in which file, what, and what it becomes.
SPOILED = {
    "r1.yaml": [
        ("---\n", ""),
        ("restartPolicy: RecreateGroup", "restartpolicy: RecreateGroup"),
        ("size: 2", "size: 3"),
        ('- "16"', "- 16"),
        ('- "16"', '- "8"'),
        ("name: r1\n", "name: r1\n  namespace: ai\n"),
        ("value: &model /ssd/", "value: &model /sdd/"),
        ("      spec:\n", "      spec:\n        hostNetwork: true\n"),
        ('"network": "vpc8"}', '"network": "vpc8"},'),
        ('"network": "vpc8"', '"network": "vpc7"'),
        ("            - path: /dev/nvidia7\n", ""),
        ("container.tcpxo-daemon", "container.tcpxo"),
        ("key: hf_api_token", "key: token"),
        ("optional: true", "optional: false"),
        ("command: [/r1, serve]", "command: [bash, -c, /r1 serve]"),
        ("- --tp", "- --tq"),
        ("$(LWS_WORKER_INDEX)", "$(LWS_WORKER)"),
        ("_ADDRESS):6002", "_ADDRESS):30000"),
        ("- 0.0.0.0", "- 127.0.0.1"),
        ("path: /health", "path: /healthz"),
        ("limits: *gpus", "limits: {nvidia.com/gpu: 4}"),
        ("terminationGracePeriodSeconds: 120\n", "\n"),
        ("              - *nvidia\n", ""),
        ("medium: Memory", 'medium: ""'),
        ("mountPath: /dev/shm", "mountPath: /dev/shm2"),
        ('gke-gcsfuse/volumes: "true"', "a: b"),
        ("mountPath: /hostsysfs", "mountPath: /sys"),
        ("dev:v1.0.14", "dev:v1.0.21"),
        ("            restartPolicy: Always\n", ""),
        (" --nccl-buildtype 223", ""),
        ("name: sys\n            hostPath", "name: system\n            hostPath"),
        ("name: r1-fetch", "name: r1-get"),
        ("/fetch/fetch.sh", "/get/fetch.sh"),
        ("r1:TAG", "r1"),
        ("privileged: true", "privileged: false")],
    "nccl.yaml": [
        ('NCCL_CROSS_NIC: "0"', "NCCL_CROSS_NIC: 0"),
        ('NCCL_MIN_NCHANNELS: "4"\n', "\n"),
        ("NCCL_PROTO: Simple", "NCCL_PROTO: Simple,LL128"),
        ("  NCCL_ALGO", "  NCCL_ALGO: Ring\n  NCCL_ALGO"),
        ("/usr/local/nccl-plugin/lib64:/usr/local/nvidia", "/usr/local/nvidia"),
        ("name: r1-nccl", "name: nccl")],
    "service.yaml": [
        ("name: r1-svc", "name: r1"),
        ("targetPort: http", "targetPort: web"),
        ('worker-index: "0"', 'worker-index: "1"'),
        ("port: 30000", "port: 80"),
        ("kind: Service", "kind: Secret")]}


def check_manifests(known_flags):
    folder = sent("k8s")
    shared = {name: folder[name] for name in ("fetch.yaml", "service.yaml")}
    for name, files in (("k8s", folder), ("k8s/h200", {**shared, **sent("k8s/h200")}),
                        ("k8s/tiny", sent("k8s/tiny"))):
        found = problems(files, known_flags)
        check(not found, f"{name}: " + "; ".join(found))
    for file, old, new in ((f, *pair) for f, pairs in SPOILED.items() for pair in pairs):
        spoiled = folder[file].replace(old, new, 1)
        check(spoiled != folder[file] and problems({**folder, file: spoiled}, known_flags),
              f"{file}: {old!r} became {new!r}, and nobody saw it")
    # What the head of nccl.yaml tells to do makes another release of plugin and daemon.
    newer = dict(folder)
    for file, old, new in (
            ("r1.yaml", r":v1\.0\.8-1", ":v1.0.15"), ("r1.yaml", r":v1\.0\.14", ":v1.0.21"),
            ("r1.yaml", " --nccl-buildtype 223", ""),
            ("r1.yaml", r", --num_nics=8, --uid=,\s*--alsologtostderr", ""),
            ("nccl.yaml", r"  NCCL_(DYNAMIC_CHUNK_SIZE|P2P_PXN_LEVEL): .*\n", ""),
            ("nccl.yaml", "NCCL_DEBUG: INFO", "NCCL_DEBUG: WARN"),
            ("nccl.yaml", "INIT,GRAPH,ENV,TUNING,NET", "INIT,NET,ENV,COLL,GRAPH"),
            ("nccl.yaml", r"_config\.textproto", "_config_simple.textproto")):
        newer[file] = re.sub(old, new, newer[file])
    found = problems(newer, known_flags)
    check(not found, "with the newer plugin: " + "; ".join(found))
    marks = re.findall(r"^ .*edit:.*", folder["r1.yaml"], re.M)
    check(len(marks) == 5, f"places to edit: {marks}")
    for placeholder in ("REGION-docker.pkg.dev/PROJECT/REPO/r1:TAG", "bucketName: GCS_BUCKET"):
        times = folder["r1.yaml"].count(placeholder)
        check(times == 1, f"{placeholder} stands {times} times")


def check_scripts():
    texts = {"fetch.yaml": parse(read("k8s/fetch.yaml"))[0]["data"]["fetch.sh"]}
    for folder, _, names in os.walk("k8s"):
        texts.update({f"{folder}/{n}": read(f"{folder}/{n}") for n in names if n.endswith(".sh")})
    for name, text in texts.items():
        result = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
        check(result.returncode == 0 and not result.stderr, f"bash -n {name}: {result.stderr}")


def check_images():
    """What a Dockerfile copies is there, and is all that make asks for."""
    for path in ("k8s/image/Dockerfile", "k8s/tiny/Dockerfile"):
        text = read(path).replace("\\\n", " ")
        stages = len(re.findall(r"^FROM ", text, re.M))
        check(stages == 2, f"{path}: want a stage that builds and one that stays")
        copies = [c.split() for c in re.findall(r"^COPY (?!--from)(.*)$", text, re.M)]
        with tempfile.TemporaryDirectory() as build:
            for source in (s for c in copies for s in c[:-1]):
                check(os.path.exists(source), f"{path}: COPY {source}: not there")
                if os.path.isfile(source):
                    shutil.copy(source, build)
            command = re.search(r"make (CUDA=\d) ", text)[1]
            result = run("make", "-n", "-C", build, command, "r1")
            check(result.returncode == 0, f"{path}: make {command}: {result.stderr}")
    build = parse(read("k8s/image/cloudbuild.yml"))[0]
    args = ["build", "--tag", "$_IMAGE", "--file", "k8s/image/Dockerfile", "."]
    check(build["images"] == ["$_IMAGE"] and build["steps"][0]["args"] == args,
          f"cloudbuild.yml: {build}")


def check_shared():
    """The checker that lies beside the tree where r1 is developed knows the whole schema."""
    checker = "../shared/tools/k8s_check.py"
    if not os.path.exists(checker):
        return skip(f"{checker} is not there; the checks of test_k8s.py stand in for it")
    result = run(sys.executable, checker, "k8s", "--r1", R1)
    if result.returncode == 2:
        return skip(result.stdout.strip())
    check(result.returncode == 0 and re.search(r"^[1-9]\d* passed, 0 failed$", result.stdout, re.M),
          f"{checker}: {result.stdout}{result.stderr}")


# ---------------------------------------------------------------------- kubectl

class Cluster(http.server.BaseHTTPRequestHandler):
    """What `kubectl apply` asks of an API server: which kinds there are, a place for objects."""
    protocol_version = "HTTP/1.1"
    kinds = {"v1": ["ConfigMap", "Service"], "apps/v1": ["Deployment"],
             "leaderworkerset.x-k8s.io/v1": ["LeaderWorkerSet"]}
    created = []

    def log_message(self, *args):
        pass

    def answer(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        path = self.path.split("?")[0]
        version = re.sub("^/apis?/", "", path)
        if path == "/api":
            return self.answer(200, {"kind": "APIVersions", "versions": ["v1"]})
        if path == "/apis":
            groups = []
            for known in list(self.kinds)[1:]:
                name, short = known.split("/")
                about = {"groupVersion": known, "version": short}
                groups.append({"name": name, "versions": [about], "preferredVersion": about})
            return self.answer(200, {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
        if version in self.kinds:
            return self.answer(200, {
                "kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version,
                "resources": [{"name": k.lower() + "s", "singularName": k.lower(), "kind": k,
                               "namespaced": True, "verbs": ["create", "get", "patch"]}
                              for k in self.kinds[version]]})
        self.answer(404, {"kind": "Status", "apiVersion": "v1", "status": "Failure",
                          "reason": "NotFound", "code": 404})

    def do_POST(self):
        o = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.created.append(o)
        self.answer(201, o)


def bare(o):
    """An object without what kubectl adds to it."""
    o = json.loads(json.dumps(o))
    for key in ("namespace", "annotations"):
        o["metadata"].pop(key, None)
    return o


def check_kubectl():
    objects = [o for text in sent("k8s").values() for o in parse(text)]
    listed = parse(read("k8s/Kustomization"))[0]
    check(listed["kind"] == "Kustomization" and sorted(listed["resources"]) == list(sent("k8s")),
          f"Kustomization lists {listed['resources']}")
    if not shutil.which("kubectl"):
        return skip("kubectl is not installed")

    def sort(them):
        return sorted((bare(o) for o in them), key=lambda o: (o["kind"], o["metadata"]["name"]))

    result = run("kubectl", "kustomize", "k8s")
    check(result.returncode == 0 and sort(parse(result.stdout)) == sort(objects),
          f"kubectl kustomize: {result.stderr}{result.stdout[:2000]}")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Cluster)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    tiny = [o for text in sent("k8s/tiny").values() for o in parse(text)]
    h200 = parse(read("k8s/h200/r1.yaml"))
    h200 += [o for o in objects if o["metadata"]["name"] in ("r1-fetch", "r1-svc")]
    url = f"http://127.0.0.1:{server.server_port}"
    for what, wanted in (
            ("-f k8s", objects), ("-k k8s", objects), ("-f k8s/tiny", tiny),
            ("-f k8s/fetch.yaml -f k8s/service.yaml -f k8s/h200", h200)):
        Cluster.created.clear()
        result = run("kubectl", "--server", url, "apply", "--validate=false", *what.split())
        check(result.returncode == 0 and sort(Cluster.created) == sort(wanted),
              f"kubectl apply {what}: {result.stdout}{result.stderr}")
    server.shutdown()


def main():
    result = run(R1, "serve", "--help")
    known_flags = set(re.findall(r"--[a-z][a-z0-9-]*", result.stdout))
    check(result.returncode == 0 and len(known_flags) > 50, f"{R1} serve --help: {result}")
    check_manifests(known_flags)
    check_scripts()
    check_images()
    check_shared()
    check_kubectl()
    finish()


if __name__ == "__main__":
    main()
