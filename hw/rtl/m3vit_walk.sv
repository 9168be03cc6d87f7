// Where the rows of a tile's tokens lie: of each token, in the order of its queue, the address of its inputs, that of its
// results, and its weight by the router. A token a cycle; four cycles from `start` to the first. Where inputs come through
// two ports, tokens are taken from both halves of a block in turn: each port reads whole rows of its half.
module m3vit_walk #(
    parameter int ADDRESS_BITS = 40,
    parameter int PORT_BITS = 128,
    parameter int PORTS = 1,   // of inputs
    parameter int QUEUE = 1024  // places
) (
    input  logic                     clk,
    input  logic                     reset,
    input  logic                     queue_write,    // before a frame: the tokens of each expert, expert after expert
    input  logic [$clog2(QUEUE)-1:0] queue_place,
    input  logic [             15:0] queue_token,
    input  logic [             17:0] queue_weight,
    input  logic                     start,
    input  logic                     second,         // map: its inputs lie side by side and its results are scattered
    input  logic [             15:0] first,          // place in the queues
    input  logic [             15:0] base,           // token of the expert
    input  logic [             15:0] count,
    input  logic [ ADDRESS_BITS-1:0] scattered,      // bytes: the rows of tokens
    input  logic [             24:0] pitch,          // words
    input  logic [ ADDRESS_BITS-1:0] dense,          // bytes: the rows of an expert's tokens
    input  logic [             24:0] dense_pitch,
    input  logic                     ready,          // there is room for this and the four before
    output logic                     busy,
    output logic                     valid,
    output logic                     port,           // of its inputs
    output logic [ ADDRESS_BITS-1:0] inputs_at,
    output logic [ ADDRESS_BITS-1:0] results_at,
    output logic [             17:0] weight
);
    localparam int SHIFT = $clog2(PORT_BITS / 8);
    logic [15:0] n, taken, place, token;
    logic running, valid_1, valid_2, valid_3, port_1, port_2, port_3;
    logic [17:0] weight_1, weight_2, weight_3;
    logic signed [16:0] token_2, place_1, place_2;
    logic signed [42:0] scattered_3, dense_3;

    assign taken = PORTS == 1 ? n : (n >> 1) + (n[0] ? (count + 16'd1) >> 1 : 0);
    assign place = first + taken;
    assign busy = running || valid_1 || valid_2 || valid_3;
    m3vit_ram #(
        .WIDTH(34),
        .DEPTH(QUEUE)
    ) queue (
        .clk(clk),
        .write(queue_write),
        .write_at(queue_place),
        .data({queue_weight, queue_token}),
        .read_at(place[$clog2(QUEUE)-1:0]),
        .word({weight_1, token})
    );
    always_ff @(posedge clk) begin
        if (reset) begin
            running <= 0;
            valid_1 <= 0;
            valid_2 <= 0;
            valid_3 <= 0;
        end else begin
            if (start) begin
                running <= 1;
                n <= 0;
            end else if (running && ready) begin
                n <= n + 1;
                if (n + 1 == count) running <= 0;
            end
            valid_1 <= running && ready;
            valid_2 <= valid_1;
            valid_3 <= valid_2;
        end
        port_1 <= n[0];
        place_1 <= 17'(base + taken);

        token_2 <= 17'(token);
        port_2 <= port_1;
        place_2 <= place_1;
        weight_2 <= weight_1;

        scattered_3 <= token_2 * $signed({1'b0, pitch});
        dense_3 <= place_2 * $signed({1'b0, dense_pitch});
        weight_3 <= weight_2;
        port_3 <= port_2;
    end
    logic [ADDRESS_BITS-1:0] scattered_at, dense_at;
    assign scattered_at = scattered + (ADDRESS_BITS'(scattered_3) << SHIFT);
    assign dense_at = dense + (ADDRESS_BITS'(dense_3) << SHIFT);
    assign valid = valid_3;
    assign port = PORTS != 1 && port_3;
    assign inputs_at = second ? dense_at : scattered_at;
    assign results_at = second ? scattered_at : dense_at;
    assign weight = weight_3;
endmodule
