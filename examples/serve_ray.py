"""Embeddings by Ray Serve: requests that come together run as one batch, in as many replicas as you ask for.

pip install "ray[serve]"
python serve_ray.py hf:facebook/dinov2-small -r 8
curl --data-binary @photo.jpg http://127.0.0.1:8000/
"""

import argparse
import asyncio

from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

import tokenmerge


@serve.deployment(max_ongoing_requests=64)
class Embed:
    def __init__(self, model, r):
        self.embed = tokenmerge.Embedder(model, r=r)

    @serve.batch(max_batch_size=8, batch_wait_timeout_s=0.005)
    async def together(self, images):
        return (await asyncio.to_thread(self.embed.run_all, images)).tolist()

    async def __call__(self, request: Request):
        body = await request.body()
        try:  # each image by itself: one that is broken must not cost its whole batch
            image = await asyncio.to_thread(self.embed.read, body)
        except tokenmerge.errors.DataError as error:
            return JSONResponse({"detail": str(error)}, status_code=400)
        return {"embedding": await self.together(image)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("-r", type=int, help="tokens that merge in every block (none)")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    serve.start(http_options={"port": arguments.port})
    serve.run(Embed.bind(arguments.model, arguments.r), blocking=True)
