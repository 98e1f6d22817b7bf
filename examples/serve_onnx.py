"""An exported model by LitServe and onnxruntime, without torch: one session, requests that come together as one batch.

tokenmerge export my_vit --method merge.json --to onnx --out merged.onnx
pip install litserve python-multipart onnxruntime pillow
python serve_onnx.py merged.onnx --mean 0.5 --std 0.5        # the preprocessing that the export printed
curl -F image=@photo.jpg http://127.0.0.1:8000/predict
"""

import argparse

import litserve
import numpy as np
import onnxruntime
from fastapi.responses import JSONResponse
from PIL import Image


class Answer(litserve.LitAPI):
    def __init__(self, path, mean, std, **batching):
        super().__init__(**batching)
        self.path, self.mean, self.std = path, mean, std

    def setup(self, device):
        self.session = onnxruntime.InferenceSession(self.path)
        _, self.channels, self.height, self.width = self.session.get_inputs()[0].shape

    def decode_request(self, request):
        try:
            image = Image.open(request["image"].file).convert("L" if self.channels == 1 else "RGB")
            image = image.resize((self.width, self.height), Image.Resampling.BILINEAR)
            pixels = (np.asarray(image, np.float32).reshape(self.height, self.width, -1) / 255 - self.mean) / self.std
            return pixels.transpose(2, 0, 1).astype(np.float32)
        except Exception as error:  # raised here it would fail the requests beside it
            return error

    def batch(self, inputs):
        return inputs

    def predict(self, inputs):
        good = [image for image in inputs if not isinstance(image, Exception)]
        found = iter(self.session.run(["answer"], {"images": np.stack(good)})[0].tolist() if good else [])
        return [one if isinstance(one, Exception) else next(found) for one in inputs]

    def unbatch(self, outputs):
        return outputs

    def encode_response(self, output):
        if isinstance(output, Exception):
            return JSONResponse({"detail": f"{type(output).__name__}: {output}"}, status_code=400)
        return {"answer": output}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a file of tokenmerge export")
    parser.add_argument("--mean", type=float, nargs="+", required=True)
    parser.add_argument("--std", type=float, nargs="+", required=True)
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    api = Answer(arguments.model, arguments.mean, arguments.std, max_batch_size=8, batch_timeout=0.005)
    litserve.LitServer(api, accelerator="cpu").run(host="127.0.0.1", port=arguments.port, generate_client_file=False)
