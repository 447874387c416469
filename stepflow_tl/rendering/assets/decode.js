// Data: from the document's JSON to step maps in nats.

/** Bytes of a zlib stream in base64. */
async function inflate(base64) {
  const packed = atob(base64);
  const bytes = new Uint8Array(packed.length);
  for (let i = 0; i < packed.length; i++) bytes[i] = packed.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** Number of cells before row `i` of a lower triangle. */
const rowStart = (i) => (i * (i + 1)) / 2;

/** Quantised maps; `quantise.py` is the other half and says what a code means. */
class Maps {
  static async decoded(packed, nSteps) {
    const [codes, rowMax] = await Promise.all([inflate(packed.codes), inflate(packed.row_max)]);
    return new Maps(packed, codes, rowMax, nSteps);
  }

  constructor({ bits, decades }, codes, rowMax, nSteps) {
    const view = new DataView(rowMax.buffer);
    this.nSteps = nSteps;
    this.codes = bits === 8 ? codes : littleEndian16(codes);
    this.rowMax = Float32Array.from({ length: rowMax.length / 4 }, (_, i) => view.getFloat32(4 * i, true));
    const highest = 2 ** bits - 1;
    this.relative = Float64Array.from({ length: highest + 1 }, (_, code) =>
      code === 0 ? 0 : 10 ** ((-decades * (highest - code)) / (highest - 1)));
  }

  /** Map number `index` as a lower triangle, row by row, in nats. */
  triangle(index) {
    const cells = rowStart(this.nSteps);
    const values = new Float64Array(cells);
    for (let i = 0, cell = 0; i < this.nSteps; i++) {
      const largest = this.rowMax[index * this.nSteps + i];
      for (let j = 0; j <= i; j++, cell++) values[cell] = largest * this.relative[this.codes[index * cells + cell]];
    }
    return values;
  }
}

function littleEndian16(bytes) {
  const codes = new Uint16Array(bytes.length / 2);
  for (let i = 0; i < codes.length; i++) codes[i] = bytes[2 * i] | (bytes[2 * i + 1] << 8);
  return codes;
}

/** Each row divided by its sum; a row without mass stays 0. */
function rowShares(triangle, nSteps) {
  const shares = new Float64Array(triangle.length);
  for (let i = 0; i < nSteps; i++) {
    const start = rowStart(i);
    let sum = 0;
    for (let j = 0; j <= i; j++) sum += triangle[start + j];
    if (sum > 0) for (let j = 0; j <= i; j++) shares[start + j] = triangle[start + j] / sum;
  }
  return shares;
}

function meanOf(triangles) {
  const mean = new Float64Array(triangles[0].length);
  for (const triangle of triangles) for (let c = 0; c < mean.length; c++) mean[c] += triangle[c] / triangles.length;
  return mean;
}
