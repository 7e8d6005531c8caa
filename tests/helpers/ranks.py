"""Two processes that train on CPU, started as torchrun starts them."""

import argparse
import signal
from collections.abc import Callable

from dynamic_dino.engine.launch import launch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from .processes import way_to_start


def run_ranks(
    main: Callable[[argparse.Namespace], None],
    max_restarts: int = 0,
    start: Callable[..., None] = launch,
    **arguments: object,
) -> None:
    """Calls ``main(args)`` by `launch` in two processes; `args` has these arguments, and `opts`.

    By what torchrun calls itself, so that the processes can be forks of this one: new ones would
    import everything once more.

    Raises:
        ChildFailedError: one of them failed.
    """
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        run_id="test",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=max_restarts,
        start_method=way_to_start(),
    )
    handled = config.signals_to_handle.split(",")
    before = {name: signal.getsignal(getattr(signal, name)) for name in handled}
    args = argparse.Namespace(num_gpus=0, num_machines=1, opts=[], **arguments)
    try:
        elastic_launch(config, start)(main, args)
    finally:  # which torchrun, whose process ends here, leaves changed
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)
