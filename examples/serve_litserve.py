"""Embeddings by LitServe: requests that come together run as one batch.

pip install litserve python-multipart
python serve_litserve.py hf:facebook/dinov2-small -r 8
curl -F image=@photo.jpg http://127.0.0.1:8000/predict
"""

import argparse

import litserve
from fastapi.responses import JSONResponse

import tokenmerge


class Embed(litserve.LitAPI):
    def __init__(self, model, r, **batching):
        super().__init__(**batching)
        self.model, self.r = model, r

    def setup(self, device):
        self.embed = tokenmerge.Embedder(self.model, r=self.r, device=device)

    def decode_request(self, request):
        try:
            return self.embed.read(request["image"].file.read())
        except Exception as error:  # raised here it would fail the requests beside it
            return error

    def batch(self, inputs):
        return inputs

    def predict(self, inputs):
        good = [image for image in inputs if not isinstance(image, Exception)]
        found = iter(self.embed.run_all(good).tolist())
        return [one if isinstance(one, Exception) else next(found) for one in inputs]

    def unbatch(self, outputs):
        return outputs

    def encode_response(self, output):
        if isinstance(output, Exception):
            return JSONResponse({"detail": f"{type(output).__name__}: {output}"}, status_code=400)
        return {"embedding": output}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("-r", type=int, help="tokens that merge in every block (none)")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    api = Embed(arguments.model, arguments.r, max_batch_size=8, batch_timeout=0.005)
    litserve.LitServer(api).run(host="127.0.0.1", port=arguments.port, generate_client_file=False)
