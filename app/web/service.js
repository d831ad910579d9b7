/** The service's doors, as the page asks them. Paths are relative: the page may stand behind a proxy, under a prefix. */

/** An answer that is an error: its status, and what it says. */
export class Refused extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

let key = sessionStorage.getItem("dinat-key") ?? "";

/** The API key of all requests from now on. */
export function useKey(given) {
  key = given;
  sessionStorage.setItem("dinat-key", given);
}

/** Whether requests carry a key. */
export const hasKey = () => key !== "";

/** {status, detail}: whether pictures are taken now. */
export async function health() {
  return (await answered("health", {}, true)).json();
}

/** What is being served: labels, configuration, the image processor's settings. */
export async function model() {
  return (await answered("model")).json();
}

/** The best labels: {predictions: [{label, class_id, score}], times, milliseconds}; milliseconds: with the way there and back. */
export async function classify(picture, topK) {
  const started = performance.now();
  const response = await answered(`classify?top_k=${topK}`, { picture });
  const { predictions } = await response.json();
  return { predictions, times: times(response), milliseconds: performance.now() - started };
}

/** Maps by name: {shape: [channels, height, width], values: Float32Array}. */
export async function features(picture, names) {
  const accept = "application/vnd.safetensors";
  const response = await answered(`features?features=${names.join(",")}`, { picture, accept });
  return safetensors(await response.arrayBuffer());
}

/** For each layer {stage, layer, dilation, size, query, rows, columns, weights}. */
export async function attention(picture, point) {
  const response = await answered(attentionPath(point), { picture });
  return (await response.json()).layers;
}

export const attentionPath = ({ y, x }) => `attention?y=${y.toFixed(4)}&x=${x.toFixed(4)}`;

async function answered(path, { picture, accept } = {}, anyStatus = false) {
  const headers = {};
  if (key) headers["X-API-Key"] = key;
  if (accept) headers.Accept = accept;
  const body = picture?.slice(0, picture.size, "application/octet-stream"); // the bytes say what they are, not the file's name
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body });
  } catch {
    throw new Error("The service does not answer. Is it still running, and is the picture still there?");
  }
  if (response.ok || anyStatus) return response;
  const problem = await response.json().catch(() => ({}));
  throw new Refused(response.status, problem.detail ?? `the service answered ${response.status} ${response.statusText}`);
}

/** Server-Timing, {part: milliseconds}. */
function times(response) {
  const parts = (response.headers.get("Server-Timing") ?? "").matchAll(/(\w+);dur=([\d.]+)/g);
  return Object.fromEntries([...parts].map(([, part, milliseconds]) => [part, Number(milliseconds)]));
}

/** https://huggingface.co/docs/safetensors: the header's length, the header, the values. */
function safetensors(buffer) {
  const length = Number(new DataView(buffer).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
  const maps = {};
  for (const [name, { shape, data_offsets: [start, end] }] of Object.entries(header)) {
    if (name !== "__metadata__") maps[name] = { shape, values: new Float32Array(buffer.slice(8 + length + start, 8 + length + end)) };
  }
  return maps;
}
