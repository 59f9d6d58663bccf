"""GPUs that a run can be planned for without having them: memory, rates, and what connects those of one machine.

Of a GPU's table, memory is what a process finds there, a few percent less than the name says. Rates are the vendors'
for dense products without sparsity, bfloat16 with sums in float32. The host link is PCI Express x16 in one direction at
what copies from pinned memory reach, about 0.8 of its nominal rate. Nothing is imported for it: a name that is not in
the table is told at once.
"""

from dataclasses import dataclass

from expertune.errors import ConfigError, nearest, option

# Name under which a GPU that is not in the table can be planned for, with a size of memory.
ANY_GPU = "cuda"


@dataclass(frozen=True)
class Link:
    """What connects ranks, with its published rate in one direction. A rank has one to itself.

    Attributes:
        name: in a sentence.
        bytes_per_second: in one direction.
        short: above a column.
    """

    name: str
    bytes_per_second: float
    short: str


# NVLink: NVIDIA data sheets of A100 (2021), H100 (2023) and B200 (2025): 600, 900 and 1800 GB/s in both directions
# together. Infinity Fabric: AMD MI300X platform data sheet (2023), 7 links of 128 GB/s in both directions. PCI Express
# 4.0 x16: PCI-SIG, 16 GT/s in each of 16 lanes, of which 128/130 carry data. Ethernet: IEEE 802.3ba (2010) and 802.3bs
# (2017).
NVLINK_3 = Link("NVLink 3", 300e9, "NVLink")
NVLINK = Link("NVLink 4", 450e9, "NVLink")
NVLINK_5 = Link("NVLink 5", 900e9, "NVLink")
INFINITY_FABRIC = Link("Infinity Fabric", 448e9, "Fabric")
PCIE = Link("PCIe 4.0", 31.5e9, "PCIe")
ETHERNET_400 = Link("400 Gbit/s Ethernet", 50e9, "400\nGbit/s")
ETHERNET_100 = Link("100 Gbit/s Ethernet", 12.5e9, "100\nGbit/s")
NETWORKS = (ETHERNET_400, ETHERNET_100)
LINKS = (NVLINK, PCIE, *NETWORKS)

_WITHOUT_BFLOAT16 = ("t4",)
_LINKS = {
    "b200": NVLINK_5,
    "h200": NVLINK,
    "h100": NVLINK,
    "a100-80gb": NVLINK_3,
    "a100-40gb": NVLINK_3,
    "mi300x": INFINITY_FABRIC,
}

_PCIE = {3: 12e9, 4: 25e9, 5: 50e9}


@dataclass(frozen=True)
class Rates:
    """What a device does in a second.

    Attributes:
        source: `measured` here, or `tabled`.
        flops_per_second: dense GEMMs.
        bytes_per_second: of the memory that GEMMs read.
        link_bytes_per_second: from where layers are offloaded to: the host link, or a disk.
        was_busy: other programs kept the machine busy while it was measured: alone it is faster.
        integer_flops_per_second: GEMMs with weights, where these are in integers and have a rate of their own.
    """

    source: str
    flops_per_second: float
    bytes_per_second: float
    link_bytes_per_second: float
    was_busy: bool = False
    integer_flops_per_second: float | None = None


@dataclass(frozen=True)
class Device:
    """A GPU by name.

    Attributes:
        name: as `--gpu` takes it.
        memory_bytes: what a process finds; 0 where nothing is known.
        rates: how fast it is, with its host link; None where nothing is known.
        has_bfloat16: whether it multiplies bfloat16; otherwise float16.
        link: what connects those of one machine in the usual server.
    """

    name: str
    memory_bytes: int = 0
    rates: Rates | None = None
    has_bfloat16: bool = True
    link: Link = PCIE


def _gpu(name: str, gib: float, gigabytes_per_second: float, teraflops: float, pcie: int) -> Device:
    rates = Rates("tabled", teraflops * 1e12, gigabytes_per_second * 1e9, _PCIE[pcie])
    return Device(name, int(gib * 2**30), rates, name not in _WITHOUT_BFLOAT16, _LINKS.get(name, PCIE))


# GiB that torch reports, GB/s, TFLOP/s, generation of PCI Express.
_TABLE = (
    # NVIDIA data sheets: H100 (2023), H200 (2024), Blackwell B200 (2025).
    _gpu("b200", 178.3, 8000, 2250, 5),
    _gpu("h200", 139.8, 4800, 989, 5),
    _gpu("h100", 79.1, 3350, 989, 5),
    _gpu("h100-pcie", 79.1, 2000, 756, 5),
    # NVIDIA A100 data sheet (2021).
    _gpu("a100-80gb", 79.1, 2039, 312, 4),
    _gpu("a100-40gb", 39.4, 1555, 312, 4),
    # NVIDIA data sheets: L40S (2023), L4 (2023), A10 (2021; the A10G of clouds has 70 TFLOP/s), T4 (2019, float16).
    _gpu("l40s", 44.3, 864, 362, 4),
    _gpu("l4", 22.0, 300, 121, 4),
    _gpu("a10g", 22.0, 600, 70, 4),
    _gpu("t4", 14.6, 320, 65, 3),
    # NVIDIA RTX Blackwell architecture (2025), appendices: GeForce, and RTX PRO 6000.
    _gpu("rtx-pro-6000", 94.9, 1792, 503, 5),
    _gpu("rtx-5090", 31.4, 1792, 209, 5),
    _gpu("rtx-5080", 15.5, 960, 112, 5),
    # NVIDIA Ada architecture, version 2.02 (2023), appendix; RTX 6000 Ada data sheet.
    _gpu("rtx-6000-ada", 47.4, 960, 364, 4),
    _gpu("rtx-4090", 23.6, 1008, 165, 4),
    _gpu("rtx-4080", 15.7, 717, 97, 4),
    # NVIDIA Ampere GA102 architecture, version 2.1 (2021), appendix; RTX A6000 data sheet.
    _gpu("rtx-a6000", 47.4, 768, 155, 4),
    _gpu("rtx-3090", 23.7, 936, 71, 4),
    _gpu("rtx-3060-12gb", 11.8, 360, 26, 4),
    # AMD Instinct MI300X data sheet (2023).
    _gpu("mi300x", 191.9, 5300, 1307, 5),
)
DEVICES = {device.name: device for device in _TABLE}


def find_device(name: str) -> Device:
    """A device of the table; case and separators do not matter.

    Raises:
        ConfigError: there is none of this name; says which is nearest.
    """
    plain = {_plain(known): device for known, device in DEVICES.items()}
    asked = _plain(name)
    if asked == ANY_GPU:
        return Device(ANY_GPU)
    if asked in plain:
        return plain[asked]
    meant = nearest(asked, plain, cutoff=0.5)
    hint = f"; did you mean {plain[meant].name}?" if meant else "."
    raise ConfigError(
        f"gpu {name}: not in the table{hint} Known: {', '.join(DEVICES)}; for any other say "
        f"{option('gpu', ANY_GPU)} and {option('memory', '24GB')}"
    )


def device_of_this_name(name: str) -> Device | None:
    """The device of the table that a driver calls so, e.g. `NVIDIA GeForce RTX 4090`; None where there is none."""
    reported = _plain(name)
    found = [device for device in _TABLE if _plain(device.name) in reported]
    return max(found, key=lambda device: len(device.name), default=None)


def _plain(name: str) -> str:
    text = "".join(letter for letter in name.lower() if letter.isalnum())
    for brand in ("nvidia", "geforce", "amd", "instinct"):
        text = text.removeprefix(brand)
    return text
