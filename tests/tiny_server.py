"""A small OpenAI-compatible server that really generates, run as a process: tiny_server.py MODEL PORT [DIE_AT FLAG]

With DIE_AT it dies in that request, but only where the file FLAG is not there yet. FLAG gets the process's id.
"""

import http.server
import json
import os
import sys
import threading
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
NAME, PORT = sys.argv[1], int(sys.argv[2])
DIE_AT, FLAG = (int(sys.argv[3]), Path(sys.argv[4])) if len(sys.argv) > 3 else (0, None)
TOKENIZER, MODEL = AutoTokenizer.from_pretrained(NAME), AutoModelForCausalLM.from_pretrained(NAME).eval()
LOCK, SERVED = threading.Lock(), []


def complete(body):
    """(text, tokens, finish reason, log-probs of the tokens) of one request; the seed decides it."""
    if "messages" in body:
        prompt = TOKENIZER.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
    else:
        prompt = body["prompt"]
    ids, logps, random = TOKENIZER(prompt)["input_ids"], [], torch.Generator().manual_seed(body.get("seed", 0))
    start = len(ids)
    with torch.no_grad():
        while len(ids) - start < body["max_tokens"] and ids[-1] != TOKENIZER.eos_token_id:
            logits = MODEL(input_ids=torch.tensor([ids])).logits[0, -1].double()
            heat = body["temperature"]
            draw = logits.argmax() if heat == 0 else torch.multinomial((logits / heat).softmax(-1), 1, generator=random)
            ids.append(int(draw))
            logps.append(float(logits.log_softmax(-1)[ids[-1]]))
    reason = "stop" if ids[-1] == TOKENIZER.eos_token_id else "length"
    return TOKENIZER.decode(ids[start:], skip_special_tokens=True), len(ids) - start, reason, logps


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer({"data": [{"id": NAME}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with LOCK:
            SERVED.append(body)
            if len(SERVED) == DIE_AT and not FLAG.exists():
                FLAG.write_text(str(os.getpid()))
                os._exit(9)
            text, tokens, reason, logps = complete(body)
        choice = {"finish_reason": reason, "index": 0}
        if "messages" in body:
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice |= {"text": text, "logprobs": {"token_logprobs": logps}}
        self.answer({"choices": [choice], "usage": {"completion_tokens": tokens}})

    def answer(self, value):
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


if __name__ == "__main__":
    http.server.ThreadingHTTPServer(("127.0.0.1", PORT), Handler).serve_forever()
