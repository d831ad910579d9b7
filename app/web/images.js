/** Sources of images (drop, paste, file, camera and drawing pad), and the part of an image that the network receives. */

import { $, context2d } from "./dom.js";

/** @typedef {(image: Blob, name: string) => void} OnImage */
/** @typedef {(message: string) => void} OnError */

const NO_IMAGE_IN_CLIPBOARD = "The clipboard contains no image: copy one first.";
const PEN_STEP = 8; // pixels that an arrow key moves the pen

/**
 * Call onImage for every image that the user provides, onError if that fails, and onRemoved for a drawing that is cleared.
 * @param {OnImage} onImage
 * @param {OnError} onError
 * @param {(image: Blob) => void} onRemoved
 */
export function listen(onImage, onError, onRemoved) {
  listenToFiles(onImage, onError);
  listenToClipboard(onImage, onError);
  listenToCamera(onImage, onError);
  listenToPad(onImage, onRemoved);
}

/**
 * @param {OnImage} onImage
 * @param {OnError} onError
 */
function listenToFiles(onImage, onError) {
  const input = $("file", HTMLInputElement);
  input.addEventListener("change", () => {
    const file = input.files?.[0];
    if (file) onImage(file, file.name);
    input.value = ""; // so that the same file can be chosen again
  });
  addEventListener("dragover", (event) => {
    event.preventDefault();
    document.body.classList.add("dragging");
  });
  addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) document.body.classList.remove("dragging");
  });
  addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("dragging");
    const files = event.dataTransfer?.files ?? [];
    if (files.length > 1) onError(`${files.length} files were dropped: drop one at a time.`);
    else if (files.length) onImage(files[0], files[0].name);
    else onError("No file was dropped: save the image first, then drop the file.");
  });
}

/**
 * @param {OnImage} onImage
 * @param {OnError} onError
 */
function listenToClipboard(onImage, onError) {
  addEventListener("paste", (event) => {
    const file = event.clipboardData?.files[0];
    if (file) onImage(file, file.name || "pasted.png");
    else if (!(event.target instanceof HTMLInputElement)) onError(NO_IMAGE_IN_CLIPBOARD);
  });
  $("paste").addEventListener("click", async () => {
    if (!navigator.clipboard?.read) return onError("This browser only pastes by keyboard: press Ctrl+V or ⌘V.");
    try {
      for (const item of await navigator.clipboard.read()) {
        const type = item.types.find((name) => name.startsWith("image/"));
        if (type) return onImage(await item.getType(type), `pasted.${type.slice(6)}`);
      }
      onError(NO_IMAGE_IN_CLIPBOARD);
    } catch {
      onError("The browser denied access to the clipboard: allow it, or press Ctrl+V or ⌘V.");
    }
  });
}

/**
 * @param {OnImage} onImage
 * @param {OnError} onError
 */
function listenToCamera(onImage, onError) {
  const dialog = $("camera-dialog", HTMLDialogElement);
  const video = $("video", HTMLVideoElement);
  /** @type {MediaStream | null} */
  let stream = null;
  $("camera").addEventListener("click", async () => {
    if (!navigator.mediaDevices) return onError("Browsers only allow the camera on https:// and localhost.");
    try {
      video.srcObject = stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
      dialog.showModal();
    } catch (error) {
      const { name, message } = /** @type {Error} */ (error);
      onError(name === "NotAllowedError" ? "Access to the camera was denied." : `The camera is not available: ${message}.`);
    }
  });
  $("capture").addEventListener("click", async () => {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
    context2d(canvas).drawImage(video, 0, 0);
    onImage(await pngOf(canvas), "camera.png");
    dialog.close();
  });
  $("close-camera").addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => {
    for (const track of stream?.getTracks() ?? []) track.stop();
    video.srcObject = stream = null;
  });
}

/**
 * @param {OnImage} onImage
 * @param {(image: Blob) => void} onRemoved
 */
function listenToPad(onImage, onRemoved) {
  const pad = $("pad", HTMLCanvasElement);
  const context = context2d(pad);
  const pen = { x: pad.width / 2, y: pad.height / 4, down: false };
  context.fillRect(0, 0, pad.width, pad.height);
  context.strokeStyle = "#fff";
  context.lineWidth = 30;
  context.lineCap = "round";

  /**
   * @param {number} x
   * @param {number} y
   * @param {boolean} draw
   */
  const movePen = (x, y, draw) => {
    if (draw) {
      context.beginPath();
      context.moveTo(pen.x, pen.y);
      context.lineTo(x, y);
      context.stroke();
    }
    Object.assign(pen, { x, y });
  };
  /** @type {Blob | null} */
  let drawing = null;
  const finish = async () => onImage((drawing = await pngOf(pad)), "drawing.png");
  /** @param {PointerEvent} event */
  const moveToPointer = ({ offsetX, offsetY }, draw = true) =>
    movePen(offsetX * pad.width / pad.clientWidth, offsetY * pad.height / pad.clientHeight, draw);
  /** @param {boolean} down */
  const setPen = (down) => {
    pen.down = down;
    $("pen").classList.toggle("down", down);
    $("pen-state").textContent = `The pen is ${down ? "lowered" : "lifted"}.`;
  };
  /** @param {boolean} visible the marker of the pen, for drawing with the keyboard */
  const showPen = (visible) => {
    $("pen").hidden = !visible;
    $("pen").style.translate = `${pen.x / pad.width * pad.clientWidth}px ${pen.y / pad.height * pad.clientHeight}px`;
  };

  pad.addEventListener("pointerdown", (event) => {
    pad.setPointerCapture(event.pointerId);
    showPen(false);
    moveToPointer(event, false);
    moveToPointer(event);
  });
  pad.addEventListener("pointermove", (event) => {
    if (event.buttons & 1) moveToPointer(event);
  });
  pad.addEventListener("pointerup", finish);
  pad.addEventListener("keydown", (event) => {
    const direction = ARROWS[event.key];
    if (!direction && event.key !== " ") return;
    event.preventDefault();
    if (direction) {
      /**
       * @param {number} value
       * @param {number} size
       */
      const clamp = (value, size) => Math.min(Math.max(value, 0), size);
      movePen(clamp(pen.x + PEN_STEP * direction[1], pad.width), clamp(pen.y + PEN_STEP * direction[0], pad.height), pen.down);
    } else {
      setPen(!pen.down);
      if (pen.down) movePen(pen.x, pen.y, true);
      else finish();
    }
    showPen(true);
  });
  pad.addEventListener("blur", () => showPen(false));
  $("draw").addEventListener("click", (event) => {
    const open = $("pad-panel").hidden;
    $("pad-panel").hidden = !open;
    $("draw").setAttribute("aria-expanded", String(open));
    if (!open) return;
    pad.focus();
    showPen(event.detail === 0); // opened by keyboard
  });
  $("clear").addEventListener("click", () => {
    context.fillRect(0, 0, pad.width, pad.height);
    setPen(false);
    $("pen-state").textContent = "The drawing is cleared.";
    if (drawing) onRemoved(drawing);
  });
}

/**
 * [down, across] of each arrow key.
 * @type {Record<string, number[] | undefined>}
 */
export const ARROWS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

/**
 * Encode a canvas as PNG.
 * @param {HTMLCanvasElement} canvas
 * @returns {Promise<Blob>}
 */
export function pngOf(canvas) {
  return new Promise((resolve, reject) => {
    canvas.toBlob((blob) => (blob ? resolve(blob) : reject(new Error("The browser cannot encode the image as PNG"))));
  });
}

/**
 * Return the size of the center crop, [height, width], or null if the image is not cropped.
 * @param {import("./service.js").ImageProcessor} processor
 */
export function cropOf(processor) {
  if (processor.crop_pct) return sides(processor.size);
  return processor.do_center_crop ? sides(processor.crop_size) : null;
}

/**
 * Return the size to which an image is resized before it is cropped, [height, width].
 * @param {import("./service.js").ImageProcessor} processor
 * @param {number} height
 * @param {number} width
 */
export function resizedSize(processor, height, width) {
  if (processor.crop_pct) return withShortEdge(Math.floor(sides(processor.size)[0] / processor.crop_pct), height, width);
  if (!processor.do_resize) return [height, width];
  const { shortest_edge: edge } = processor.size;
  return edge ? withShortEdge(edge, height, width) : sides(processor.size);
}

/**
 * Return the region of an image that the network receives, in pixels.
 * @param {import("./service.js").ImageProcessor} processor
 * @param {number} width
 * @param {number} height
 */
export function visibleRegion(processor, width, height) {
  const resized = resizedSize(processor, height, width);
  const crop = cropOf(processor) ?? resized;
  const [down, across] = [crop[0] / resized[0], crop[1] / resized[1]];
  return { x: width * (1 - across) / 2, y: height * (1 - down) / 2, width: width * across, height: height * down };
}

/**
 * @param {number | {height: number, width: number}} size
 * @returns {number[]}
 */
const sides = (size) => (typeof size === "number" ? [size, size] : [size.height, size.width]);

/**
 * @param {number} edge
 * @param {number} height
 * @param {number} width
 */
const withShortEdge = (edge, height, width) => [edge * height / Math.min(height, width), edge * width / Math.min(height, width)];
