"""A cost model of one iteration of each solver on many devices: bytes, messages, operations and time.

Messages and their bytes are those that the tests count in the compiled programs. The time is the longer of memory and
arithmetic, plus that of the exchanges; nothing overlaps.
"""

import math
from dataclasses import dataclass

# The smallest number of passes of a Doge-ADMM step over an array of the nodes, and over a row array of the edges.
NODE_PASSES, EDGE_PASSES = 5, 3
# Iterations between two certificates, and numbers that a certificate sums over all devices.
CADENCE, CERTIFICATE_SUMS = 10, 8
# Counts and losses of four bytes that an iteration of mAIHT sums over all devices; 15 with the monitor "always".
LAYER_SUMS = 12
# Arrays of the weight's size that an iteration of mAIHT reads or writes besides the product.
WEIGHT_PASSES = 12


@dataclass(frozen=True)
class Machine:
    """The speed of one device.

    Attributes:
        bandwidth: bytes per second from and to its memory.
        rate: float32 operations per second of a matrix product.
        latency: seconds of one message, or of one stage of a sum over all devices.
        link: bytes per second to another device.
    """

    bandwidth: float
    rate: float
    latency: float
    link: float


@dataclass(frozen=True)
class Cost:
    """One iteration on one device.

    Attributes:
        moved: bytes from and to memory.
        flops: operations.
        messages: to neighbours.
        sent: bytes in them.
        sums: over all devices.
        summed: bytes in them.
    """

    moved: float
    flops: float
    messages: float
    sent: float
    sums: float
    summed: float

    def work_seconds(self, machine: Machine) -> float:
        """Seconds of work, without exchanges."""
        return max(self.moved / machine.bandwidth, self.flops / machine.rate)

    def exchange_seconds(self, machine: Machine, devices: int) -> float:
        """Seconds of messages and sums; a sum over all devices takes a stage each time their number doubles."""
        if devices == 1:
            return 0.0
        stages = math.ceil(math.log2(devices))
        messages = self.messages * machine.latency + self.sent / machine.link
        return messages + self.sums * stages * machine.latency + 2 * self.summed / machine.link

    def seconds(self, machine: Machine, devices: int) -> float:
        """Work and exchanges."""
        return self.work_seconds(machine) + self.exchange_seconds(machine, devices)


def grid_iteration(shape: tuple[int, ...], order: int, devices: int, itemsize: int = 4) -> Cost:
    """An iteration of Doge-ADMM on a grid in slabs along its first axis, with its share of a certificate."""
    rows = math.ceil(shape[0] / devices)
    nodes = rows * math.prod(shape[1:])
    row_arrays = len(shape) if order % 2 == 0 else 1
    products = 2 + 2 / CADENCE
    messages = products * (order + 1)
    return Cost(
        moved=itemsize * nodes * (NODE_PASSES + EDGE_PASSES * row_arrays),
        flops=nodes * (order + 1) * 4.0 * len(shape) * products,
        messages=messages,
        sent=messages * itemsize * math.prod(shape[1:]),
        sums=CERTIFICATE_SUMS / CADENCE,
        summed=CERTIFICATE_SUMS * itemsize / CADENCE,
    )


def layer_iteration(outputs: int, inputs: int, devices: int) -> Cost:
    """An iteration of mAIHT on a layer cut by outputs, with the monitor "on_increase"."""
    columns = math.ceil(outputs / devices)
    return Cost(
        moved=4.0 * inputs**2 + 4.0 * WEIGHT_PASSES * inputs * columns,
        flops=2.0 * inputs**2 * columns,
        messages=0,
        sent=0,
        sums=LAYER_SUMS,
        summed=4.0 * LAYER_SUMS,
    )


def block_seconds(linears: dict[tuple[int, int], int], machine: Machine, devices: int) -> float:
    """Seconds of an iteration of mAIHT on all linears of a block, side by side or cut, whichever is faster.

    Args:
        linears: the number of linears of each shape `(out, in)`.
        machine: of each device.
        devices: their number.
    """
    seconds = 0.0
    for (outputs, inputs), count in linears.items():
        alone = layer_iteration(outputs, inputs, 1).seconds(machine, 1)
        cut = layer_iteration(outputs, inputs, devices).seconds(machine, devices)
        full, left = divmod(count, devices)
        seconds += full * alone + min(alone if left else 0.0, left * cut)
    return seconds


def calibration(inputs: int, tokens: int, linears: int, devices: int) -> Cost:
    """The Gram matrix of a block's input and the linears that use it, tokens distributed over the devices; one sum."""
    each = tokens / devices
    return Cost(
        moved=4.0 * inputs**2 + 4.0 * each * inputs,
        flops=2.0 * each * inputs**2 * (1 + linears),
        messages=0,
        sent=0,
        sums=1,
        summed=4.0 * inputs**2,
    )
