// A memory with one port to write and one to read; what is read comes a cycle after its address.
// STYLE: what it is made of, "block", "ultra" or "distributed".
module m3vit_ram #(
    parameter int WIDTH = 128,
    parameter int DEPTH = 64,
    parameter STYLE = "block",
    localparam int ADDRESS = DEPTH > 1 ? $clog2(DEPTH) : 1
) (
    input  logic               clk,
    input  logic               write,
    input  logic [ADDRESS-1:0] write_at,
    input  logic [  WIDTH-1:0] data,
    input  logic [ADDRESS-1:0] read_at,
    output logic [  WIDTH-1:0] word
);
    (* ram_style = STYLE *) logic [WIDTH-1:0] store[0:DEPTH-1];
    always_ff @(posedge clk) begin
        if (write) store[write_at] <= data;
        word <= store[read_at];
    end
endmodule
