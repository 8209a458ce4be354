"""Another Ray Serve application that asks tetriserve for pictures through its handle, without HTTP.

    python examples/ray_app.py      # on the cluster, or the machine, that serves tetriserve

One prompt in three sizes at once: the small ones are due soon, the large one may take its time.
"""

from __future__ import annotations

import asyncio

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from tetriserve.errors import Overloaded
from tetriserve.request import GenerateRequest, GenerateResult

SIZES = {256: 5.0, 512: 10.0, 1024: 60.0}
"""Side in pixels: seconds until it is due."""


class Posters:
    """A picture in all sizes; leaves out what there is no room for."""

    def __init__(self) -> None:
        self._pictures: DeploymentHandle = serve.get_app_handle("tetriserve")

    async def make(self, prompt: str, seed: int) -> dict[int, tuple[float, bool | None]]:
        """Seconds and whether the deadline was met, by side."""
        asked = {
            side: GenerateRequest(prompt, side, side, num_inference_steps=8, seed=seed, slo_s=slo_s)
            for side, slo_s in SIZES.items()
        }
        answers = await asyncio.gather(*map(self._one, asked.values()))
        return {
            side: (answer.metrics.total_s, answer.metrics.slo_met)
            for side, answer in zip(asked, answers, strict=True)
            if answer is not None
        }

    async def _one(self, request: GenerateRequest) -> GenerateResult | None:
        try:
            return await self._pictures.generate.remote(request)
        except Overloaded:
            return None


def main() -> None:
    ray.init(address="auto", namespace="serve", log_to_driver=False)
    deployment = serve.deployment(ray_actor_options={"num_cpus": 0})(Posters)
    posters = serve.run(deployment.bind(), name="posters", route_prefix=None)
    try:
        for side, (seconds, met) in posters.make.remote("a small red circle", 1).result().items():
            print(f"{side}x{side}: {seconds:.2f} s, deadline {'met' if met else 'missed'}")
    finally:
        serve.delete("posters")


if __name__ == "__main__":
    main()
