/** Access to the elements of the page. */

/**
 * Return the element with an id.
 * @template {HTMLElement} T
 * @param {string} id
 * @param {new () => T} [type] class of the element
 * @returns {T}
 */
export function $(id, type) {
  const found = document.getElementById(id);
  if (!(found instanceof (type ?? HTMLElement))) throw new TypeError(`The page has no ${type?.name ?? "element"} #${id}`);
  return /** @type {T} */ (found);
}

/**
 * Create an element with properties and children.
 * @template {keyof HTMLElementTagNameMap} Tag
 * @param {Tag} tag
 * @param {Partial<HTMLElementTagNameMap[Tag]>} [properties]
 * @param {...(Node | string)} children
 * @returns {HTMLElementTagNameMap[Tag]}
 */
export function element(tag, properties = {}, ...children) {
  const created = Object.assign(document.createElement(tag), properties);
  created.append(...children);
  return created;
}

/**
 * Return the 2D context of a canvas.
 * @param {HTMLCanvasElement} canvas
 * @returns {CanvasRenderingContext2D}
 */
export function context2d(canvas) {
  const context = canvas.getContext("2d");
  if (!context) throw new Error("The browser has no memory for another canvas");
  return context;
}
